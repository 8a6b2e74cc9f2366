"""Attention in kernels: interpreted on the CPU, and lowered for TPUs and GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from table import relative_error

import jaxprop as jp
from jaxprop.core.arrays import wide
from jaxprop.layers import by_parts, flash, on_chip
from jaxprop.layers.heads import Inputs
from jaxprop.layers.on_chip import Blocks

saving = functools.partial(jp.Attention, save="logsumexp", block=16, kernels=True)
platforms = pytest.mark.parametrize("platform", ["cuda", "tpu"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Small blocks of different sizes, so that few positions make many blocks."""
    plan = flash.Plan(Blocks(32, 16), Blocks(16, 32), Blocks(32, 16))
    monkeypatch.setattr(flash, "plan_of", lambda platform, q: plan)


def problem(layer, n=2, t=50, d=6, memory=None, masked=False, dtype=jnp.float64, seed=0):
    """Inputs of a layer, a padding mask or None, and the cotangent by head."""
    rng = np.random.default_rng(seed)
    kv = 2 * (layer.kv_heads or layer.heads) * d
    s = memory or t
    x = rng.normal(size=(n, t, layer.heads * d + (0 if memory else kv)))
    parts = (x, rng.normal(size=(n, s, kv))) if memory else (x,)
    mask = None
    if masked:
        mask = rng.uniform(size=(n, 1, 1, s)) < 0.7
        mask[0] = False
    ct = rng.normal(size=(n, layer.heads, t, d))
    return cast(jax.device_put((Inputs(*parts), mask, ct)), dtype)


def halves(attend, pull, x, mask, ct):
    y, kept = attend(x, mask)
    mean = jnp.sum(wide(ct) * wide(y), -1, keepdims=True)
    return (y, kept), pull(x, mask, ct, mean, kept)


@functools.partial(jax.jit, static_argnums=0)
def by_xla(layer, *args):
    return halves(
        functools.partial(by_parts.attend, layer), functools.partial(by_parts.pull, layer), *args
    )


def by_kernels(layer, platform, *args):
    return halves(
        functools.partial(flash.attend, layer, platform, interpret=True),
        functools.partial(flash.pull, layer, platform, interpret=True),
        *args,
    )


def cast(tree, dtype):
    floating = lambda z: jnp.issubdtype(z.dtype, jnp.floating)  # noqa: E731
    by_numpy = lambda z: jax.device_put(np.asarray(z).astype(dtype))  # noqa: E731
    return jax.tree.map(lambda z: by_numpy(z) if floating(z) else z, tree)


CASES = {
    "causal": (saving(2), {}),
    "full": (saving(2, causal=False), {}),
    "window": (saving(2, window=9), {}),
    "window both ways": (saving(2, causal=False, window=20), {}),
    "groups": (saving(4, kv_heads=2), {}),
    "one head of keys": (saving(3, kv_heads=1, window=40), {"n": 1, "t": 33}),
    "padding": (saving(2), {"masked": True}),
    "padding, full": (saving(1, causal=False), {"masked": True, "t": 64, "n": 3}),
    "memory": (saving(2, causal=False), {"t": 40, "memory": 21}),
    "padded memory": (saving(2, causal=False, kv_heads=1), {"memory": 70, "masked": True}),
    "one position": (saving(1), {"n": 1, "t": 1, "d": 1}),
    "whole blocks": (saving(1), {"t": 64, "d": 16}),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("case", CASES)
@platforms
def test_kernels_are_what_xla_computes(platform, case, small_blocks):
    layer, sizes = CASES[case]
    args = problem(layer, **sizes)
    got = jax.jit(functools.partial(by_kernels, layer, platform))(*cast(args, jnp.float32))
    want = by_xla(layer, *args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    for part, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # the logsumexp of no keys is the dtype's minimum
        part, expected = (np.maximum(np.asarray(z, np.float64), -1e9) for z in (part, expected))
        assert relative_error(part, expected) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@platforms
def test_narrow_floats_are_no_worse_than_by_xla(platform, dtype, small_blocks):
    layer = saving(2)
    args = problem(layer, t=100, dtype=dtype)
    want = by_xla(layer, *cast(args, jnp.float64))
    got = jax.jit(functools.partial(by_kernels, layer, platform))(*args)
    plain = by_xla(layer, *args)
    assert [z.dtype for z in jax.tree.leaves(got)] == [z.dtype for z in jax.tree.leaves(plain)]
    for ours, theirs, exact in zip(*map(jax.tree.leaves, (got, plain, want)), strict=True):
        error, usual = (relative_error(z.astype(jnp.float64), exact) for z in (ours, theirs))
        assert error <= 1.5 * usual + 1e-6


@platforms
def test_large_scores_leave_finite_cotangents(platform, small_blocks):
    """Scores so large that forward and backward round them apart by more than exp can take."""
    x, _, ct = cast(problem(saving(2), t=40), jnp.float32)
    run = jax.jit(functools.partial(by_kernels, saving(2), platform))
    (y, _), (d_q, d_k, *_) = run(Inputs(1e8 * x.x), None, ct)
    assert all(np.isfinite(z).all() for z in (y, d_q, d_k))


@pytest.mark.full
def test_blocks_of_each_platform_are_right_too():
    layer = saving(1)
    args = problem(layer, n=1, t=300, d=4)
    want = by_xla(layer, *args)
    for platform in ("cuda", "tpu"):
        run = jax.jit(functools.partial(by_kernels, layer, platform))
        got = run(*cast(args, jnp.float32))
        assert relative_error(cast(got, jnp.float64), want) <= 2e-6


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.full)])
def test_over_devices_and_under_vmap(check_vma, small_blocks):
    layer, n = saving(2), 4
    x, _, ct = cast(problem(layer, n=n, t=20), jnp.float32)
    f = functools.partial(by_kernels, layer, "cuda")
    want = by_xla(layer, x, None, ct)

    def run(x, ct):
        return f(Inputs(x), None, ct)

    mesh = jax.make_mesh((2, 2), ("n", "h"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("n")
    shared = jax.shard_map(
        run, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check_vma
    )
    assert relative_error(jax.jit(shared)(x.x, ct), want) <= 2e-6
    mapped = jax.jit(jax.vmap(lambda x, ct: run(x[None], ct[None])))(x.x, ct)
    assert relative_error(jax.tree.map(lambda z: np.asarray(z)[:, 0], mapped), want) <= 2e-6
    of_one = jax.jit(jax.vmap(run, (None, 0)))(x.x, np.stack([ct, 2 * ct]))
    assert (
        relative_error(
            jax.tree.map(lambda z: np.asarray(z)[1], of_one[1]),
            jax.tree.map(lambda z: 2 * np.asarray(z), want[1]),
        )
        <= 2e-6
    )


@pytest.mark.parametrize("layer", [saving(4), saving(8, kv_heads=2)], ids=["heads", "groups"])
def test_xla_splits_examples_and_heads_over_gpus(layer, small_blocks):
    x, _, ct = cast(problem(layer, n=4, t=20), jnp.float32)
    mesh = jax.make_mesh((2, 4), ("n", "h"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec("n", "h"))

    @functools.partial(jax.jit, in_shardings=(NamedSharding(mesh, PartitionSpec("n")), where))
    def run(x, ct):
        return by_kernels(layer, "cuda", Inputs(x), None, ct)

    (y, _), (d_q, *_) = got = run(x.x, ct)
    assert relative_error(got, by_xla(layer, x, None, ct)) <= 2e-6
    for z in (y, d_q):
        assert z.sharding.is_equivalent_to(where, z.ndim)


@pytest.mark.parametrize("spec", ["none", "positions", "features", "a part of an axis", "unknown"])
def test_gpus_may_hold_other_parts(spec, small_blocks):
    """Such as positions, more parts of the features than heads, or an unknown sharding."""
    layer = saving(4)
    (x, *_), _, ct = cast(problem(layer, n=4, t=20), jnp.float32)
    run = jax.jit(lambda x, ct: by_kernels(layer, "cuda", Inputs(x), None, ct))
    want = by_xla(layer, Inputs(x), None, ct)
    mesh = jax.make_mesh((2, 4), ("n", "h"), axis_types=(AxisType.Auto,) * 2)
    if spec == "unknown":
        with jax.set_mesh(mesh):
            assert relative_error(run(x, ct), want) <= 2e-6
        return
    specs = {
        "none": PartitionSpec(),
        "positions": PartitionSpec("n", "h"),
        "features": PartitionSpec(None, None, "h"),
        "a part of an axis": PartitionSpec(None, None, ("n", "h")),
    }
    x = jax.device_put(x, NamedSharding(mesh, specs[spec]))
    assert relative_error(run(x, ct), want) <= 2e-6


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
def test_a_memory_may_be_the_same_on_all_devices(kernels):
    layer = saving(2, causal=False, kernels=kernels)
    (x, memory, _), _, ct = problem(layer, n=4, t=20, memory=7, dtype=jnp.float32)
    memory, ct = memory[:2], np.asarray(ct).swapaxes(1, 2).reshape(4, 20, 12)

    def both(x, memory, ct):
        y, residuals = layer.forward((), (x, memory))
        return y, layer.backward((), residuals, ct)[1]

    spec = PartitionSpec("n")
    mesh = jax.make_mesh((2,), ("n",), axis_types=(AxisType.Auto,))
    shared = jax.shard_map(
        both, mesh=mesh, in_specs=(spec, PartitionSpec(), spec), out_specs=spec, check_vma=True
    )
    want = jax.jit(both)(x, np.concatenate([memory, memory]), ct)
    assert relative_error(jax.jit(shared)(x, memory, ct), want) <= 2e-6


def test_derivatives_of_both_halves_are_those_of_the_plain_ones():
    """Forward over reverse, and reverse over reverse, on a CPU without kernels."""
    kept, plain = saving(2), jp.Attention(2)
    x = jax.random.normal(jax.random.key(0), (2, 9, 12), jnp.float32)

    def f(layer, x):
        y, residuals = layer.forward((), x)
        return layer.backward((), residuals, y)[1]

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(layer, x):
        forward = jax.jvp(functools.partial(f, layer), (x,), (x,))
        return forward, jax.grad(lambda x: (f(layer, x) ** 2).sum())(x)

    got, want = (derivatives(layer, x) for layer in (kept, plain))
    assert relative_error(got, want) <= 1e-5


def exported(layer, platform, x, *mask, wrap=lambda f: f):
    def run(x, *mask):
        params = layer.bind((), mask=mask[0]) if mask else ()
        y, residuals = layer.forward(params, x)
        return layer.backward(params, residuals, y)[1]

    triton = jax.export.DisabledSafetyCheck.custom_call(CALL["cuda"])
    export = jax.export.export(jax.jit(wrap(run)), platforms=[platform], disabled_checks=[triton])
    return export(x, *mask).mlir_module()


CALL = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="JAX lowers Triton beside a GPU alone")
def test_a_gpu_has_kernels_where_they_fit():
    x = jnp.ones((2, 20, 24), jnp.float32)
    has = lambda layer, *args: CALL["cuda"] in exported(layer, "cuda", *args)  # noqa: E731
    real, square = jnp.ones((2, 20), bool), jnp.ones((2, 20, 20), bool)
    assert has(saving(2), x)
    assert has(saving(2), x.astype(jnp.float16), real)
    assert has(saving(2, causal=False), (x, jnp.ones((2, 7, 48), jnp.float32)))
    assert not has(jp.Attention(2), x)
    assert not has(saving(2), x.astype(jnp.float64))
    assert not has(saving(2), x, square)
    assert not has(saving(2), (x, jnp.ones((2, 2, 20, 20), jnp.float32)))
    assert not has(saving(1), jnp.ones((1, 2, 3 * 512), jnp.float32))
    assert not has(saving(2, kernels=False), x)
    assert not has(saving(2, kernels=None), x)  # JAX's default device here is a CPU
    rows = jax.export.symbolic_shape("n, 20, 24")
    assert not has(saving(2), jax.ShapeDtypeStruct(rows, jnp.float32))
    assert CALL["cuda"] not in exported(saving(2), "cpu", x)


def test_a_tpu_has_kernels_in_shard_map_where_positions_fit(monkeypatch):
    """XLA does not split kernels, and a program's number of devices is not known."""
    x = jnp.ones((2, 20, 24), jnp.float32)
    mesh = jax.make_mesh((1,), ("n",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("n")
    alone = functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec,), out_specs=spec)
    assert CALL["tpu"] in exported(saving(2), "tpu", x, wrap=alone)
    assert CALL["tpu"] not in exported(saving(2), "tpu", x)
    assert CALL["tpu"] not in exported(saving(2), "tpu", x.astype(jnp.float16), wrap=alone)
    monkeypatch.setattr(on_chip, "VMEM", 2**15)
    assert CALL["tpu"] not in exported(saving(2), "tpu", x, wrap=alone)


def test_older_gpus_have_none(monkeypatch):
    class Old:
        platform, compute_capability = "gpu", "7.5"

    x = jnp.ones((2, 20, 24), jnp.float32)
    assert on_chip.platforms(x, 20, 8) == ["cuda"]
    monkeypatch.setattr(jax, "devices", lambda: [Old()])
    assert on_chip.platforms(x, 20, 8) == []


def test_one_tpu_has_kernels_without_more(monkeypatch):
    class Tpu:
        platform = "tpu"

    x = jnp.ones((2, 20, 24), jnp.float32)
    monkeypatch.setattr(jax, "devices", lambda: [Tpu()])
    assert on_chip.platforms(x, 20, 8) == ["cuda"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert on_chip.platforms(x, 20, 8) == ["cuda", "tpu"]
