"""Programs exported for any batch size are the same when a fresh process reads their bytes."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from table import TABLE, Row, at, normal, of_size, relative_error, row_id

import jaxprop as jp
from jaxprop.core.tree import learned

pytest.importorskip("flatbuffers")

for state in (optax.TraceState, optax.EmptyState):  # states of optax.sgd with momentum
    export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")

LOSS = jp.HalfSquaredError()
CNN = jp.chain(
    jp.Conv(3, (2, 2)), jp.Relu(), jp.MaxPool((2, 2)), jp.Flatten(), jp.Reshape((2, 3)), jp.Dense(2)
)
GPT = jp.chain(jp.Positions(4), jp.repeat(jp.skip(jp.Dense(6)), 2), jp.Attention(1), jp.Lstm(2))
FEW = [Row(jp.Dense(3), normal(5, 4)), Row(CNN, normal(3, 4, 3, 2)), Row(GPT, normal(3, 4, 6))]
rows = pytest.mark.parametrize(
    "row", [*FEW, *(pytest.param(row, marks=pytest.mark.full) for row in TABLE)], ids=row_id
)


def for_any_batch(*trees: Any) -> Any:
    """Structs like the arrays, with a symbolic b as axis 0."""
    (b,) = export.symbolic_shape("b")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((b, *leaf.shape[1:]), leaf.dtype), trees)


def read_back(f, params, x, target):
    """F, exported for any batch size to bytes, and read back."""
    fixed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    program = export.export(jax.jit(f))(fixed, *for_any_batch(x, target))
    return export.deserialize(program.serialize()).call


def everything(row, has_params):
    """A function of a batch that returns every quantity that the row's layer has."""
    net = row.layer
    asked: dict[str, jp.Quantity] = {}
    if has_params and not net.batch_coupled:
        asked = {
            "each": jp.PerExampleGrads(),
            "norms": jp.SqNorms(),
            "gram": jp.Gram(),
            "gram by layer": jp.Gram(per_layer=True),
            "each diagonal": jp.DiagGGN(per_example=True),
            "moment": jp.SecondMoment(),
            "clipped": jp.Clipped(0.3),
            "in two passes": jp.Clipped(0.3, two_pass=True),
            "diagonal": jp.DiagGGN(),
            "root": jp.GGNRoot(),
        }
        if len(jax.tree.leaves(row.x)[0]) > 1:
            asked["noise"] = jp.NoiseScale()

    def f(params, x, target):
        y, _ = net.forward(params, x)
        of_batch = jp.value_and_grad(net, LOSS)(params, x, target)
        return y, of_batch, jp.quantities(net, LOSS, **asked)(params, x, target) if asked else ()

    return f


@pytest.mark.few(1)
@rows
def test_one_program_for_any_batch_size(row):
    params, x = at(row)
    f = everything(row, jax.tree.leaves(learned(params)))
    y, _ = jax.eval_shape(row.layer.forward, params, x)
    target = jnp.asarray(normal(*y.shape)) / 2
    program = read_back(f, params, x, target)
    for examples in (3, 2):
        batch = of_size(examples, (x, target))
        got, expected = program(params, *batch), jax.jit(f)(params, *batch)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_a_form_is_written_with_its_static_fields():
    conv = jp.Conv(4, (2, 3), 2, groups=2)
    params, x = at(Row(conv, normal(2, 5, 4, 2)))
    y, residuals = conv.forward(params, x)
    program = export.export(jax.jit(conv.backward))(params, residuals, y)
    d_params, d_x = export.deserialize(program.serialize()).call(params, residuals, y)
    expected, of_x = conv.backward(params, residuals, y)
    assert jax.tree.structure(d_params) == jax.tree.structure(expected)
    assert relative_error(d_params.w.sum(), expected.w.sum()) <= 1e-12
    assert relative_error(d_x, of_x) <= 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_is_exported_as_it_is(fused):
    net = jp.chain(jp.Dense(3), jp.BatchNorm(training=False), jp.Dense(2))
    params, x = at(Row(net, normal(4, 5)))
    optimizer = optax.sgd(0.1, momentum=0.9)
    update = jp.make_update(net, LOSS, optimizer, fused=fused, max_norm=0.1, skip_nonfinite=True)
    state, target = update.init(params), jnp.ones((4, 2))
    fixed = jax.eval_shape(lambda: (params, state))
    blob = export.export(update)(*fixed, *for_any_batch(x, target)).serialize()
    got = export.deserialize(blob).call(params, state, x, target)
    expected = update(params, state, x, target)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert relative_error(got, expected) <= 1e-12


READER = """
import sys
import jax
import numpy as np
from jax import export
import jaxprop as jp
jax.config.update("jax_enable_x64", True)
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
leaves = [given[f"arr_{i}"] for i in range(len(given.files))]
(params, x, target), _ = jax.tree.unflatten(program.in_tree, leaves)
value, grads = program.call(params, x, target)
print(type(params[0]).__name__, repr(float(value)), repr(float(np.sum(grads[0].w))))
"""


def test_a_fresh_process_that_imports_jaxprop_reads_it(tmp_path):
    net = jp.chain(jp.Dense(3), jp.BatchNorm(training=False), jp.Relu(), jp.frozen(jp.Dense(2)))
    params, x = at(Row(net, normal(4, 5)))
    target = jnp.ones((4, 2))
    f = jp.value_and_grad(net, LOSS)
    program = export.export(jax.jit(f))(params, *for_any_batch(x, target))
    (tmp_path / "program").write_bytes(program.serialize())
    np.savez(tmp_path / "given.npz", *jax.tree.leaves((params, x, target)))
    files = str(tmp_path / "program"), str(tmp_path / "given.npz")
    done = subprocess.run([sys.executable, "-c", READER, *files], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    name, value, of_w = done.stdout.split()
    expected, grads = f(params, x, target)
    assert name == "AffineParams"
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert float(of_w) == pytest.approx(float(grads[0].w.sum()), rel=1e-12)


def test_micro_batches_of_a_batch_that_is_a_multiple():
    net = jp.chain(jp.Dense(3), jp.Tanh())
    params, x = at(Row(net, normal(4, 5)))
    f, target = jp.value_and_grad(net, LOSS, micro_batches=2), jnp.ones((4, 3))
    (twice,) = export.symbolic_shape("2*b")
    structs = [jax.ShapeDtypeStruct((twice, a.shape[1]), a.dtype) for a in (x, target)]
    program = export.export(jax.jit(f))(params, *structs)
    assert relative_error(program.call(params, x, target), f(params, x, target)) <= 1e-12
    with pytest.raises(ValueError, match=r"b examples do not divide into 2 equal"):
        export.export(jax.jit(f))(params, *for_any_batch(x, target))


PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_everything_lowers_for_every_platform(row, dtype):
    params, x = at(row, dtype)
    f = everything(row, jax.tree.leaves(learned(params)))
    y, _ = jax.eval_shape(row.layer.forward, params, x)
    target = jax.ShapeDtypeStruct(y.shape, y.dtype)
    program = export.export(jax.jit(f), platforms=PLATFORMS)(params, x, target)
    assert program.platforms == PLATFORMS
