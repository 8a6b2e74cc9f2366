"""Data parallel, fully sharded and tensor parallel: same numbers, and which collectives run."""

import contextlib
import itertools
import math
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from table import TABLE, Row, at, first_of_their_kind, normal, of_size, relative_error, row_id
from test_examples import run

import jaxprop as jp
from jaxprop.core.tree import learned

LOSS = jp.CrossEntropy()
GPT = jp.models.gpt2(jp.models.Gpt2Config(vocab=24, length=4, features=16, heads=2, layers=2))
MLP = jp.chain(
    jp.Dense(16),
    jp.repeat(jp.skip(jp.chain(jp.Dense(32), jp.Gelu(), jp.Dense(16))), 2),
    jp.Dense(8),
)
IDS = np.random.default_rng(0).integers(0, 24, (8, 5))
PROBLEMS = {
    "gpt2": (GPT, IDS[:, :4], IDS[:, 1:]),
    "mlp": (MLP, np.random.default_rng(1).normal(size=(8, 16)), np.arange(8)),
}


def mesh_of(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MESH = mesh_of(data=4, model=2)


def over(*names: Any, mesh: Mesh = MESH) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*names))


class How(NamedTuple):
    """A way to spread a training step: shardings of params and state, of the batch, and the net."""

    place: Any
    batch: NamedSharding
    net: Any = staticmethod(lambda net: net)


HOWS = {
    "data parallel": How(lambda tree: jax.tree.map(lambda _: over(), tree), over("data")),
    "fully sharded": How(
        lambda tree: jp.sharding.fully_sharded(tree, MESH, smallest=16),
        over(("data", "model")),
        lambda net: jp.sharding.gathered(net, MESH),
    ),
    "tensor parallel": How(
        lambda tree: jp.sharding.tensor_parallel(tree, MESH, "model", vocab=24), over("data")
    ),
}


def problem(name):
    net, x, target = PROBLEMS[name]
    params = net.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return net, params, jnp.asarray(x), jnp.asarray(target)


def everything(net, curvature):
    walk = jp.quantities(
        net,
        LOSS,
        each=jp.PerExampleGrads(),
        sq_norms=jp.SqNorms(),
        second_moment=jp.SecondMoment(),
        variance=jp.Variance(),
        noise_scale=jp.NoiseScale(),
        gram=jp.Gram(),
    )

    def f(params, x, target):
        results = walk(params, x, target)
        results["value_and_grad"] = jp.value_and_grad(net, LOSS)(params, x, target)
        results["clipped_grad"] = jp.clipped_grad(net, LOSS, 0.1)(params, x, target)
        results["diag_ggn"] = jp.diag_ggn(net, LOSS)(params, x, target)
        if curvature:  # a GPT has no Kronecker factors: its table is tied
            key = jax.random.key(1)
            results["kronecker"] = jp.kronecker_factors(net, LOSS)(params, x, target, key=key)
        return results

    return jax.jit(f)


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.full), "mlp"])
def test_every_quantity_is_that_of_one_device(name):
    net, params, x, target = problem(name)
    expected = everything(net, name == "mlp")(params, x, target)
    for how, (place, batch, spread) in HOWS.items():
        if name == "gpt2" and how == "data parallel":
            continue  # the batch is split under the others too, and a GPT takes long to compile
        placed = jax.device_put(params, place(params))
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed)) == (
            how != "data parallel"
        )
        got = everything(spread(net), name == "mlp")(placed, *jax.device_put((x, target), batch))
        assert got.keys() == expected.keys()
        for quantity, want in expected.items():
            assert relative_error(got[quantity], want) <= 1e-12, (how, quantity)


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.full), True])
def test_updates_are_those_of_one_device_and_stay_in_place(fused):
    net, start, x, target = problem("gpt2")
    start = jax.tree.map(np.asarray, start)  # update donates its arguments
    optimizer = optax.adam(1e-2, eps=1e-3)

    def train(net, params, state, *batch):
        update = jp.make_update(net, LOSS, optimizer, fused=fused, max_norm=1.0)
        for _ in range(3):
            params, state, value = update(params, state, *batch)
        return params, state, value

    expected = train(net, jax.tree.map(jnp.asarray, start), optimizer.init(start), x, target)
    for how, (place, batch, spread) in HOWS.items():
        placed = tuple(jax.device_put(t, place(t)) for t in (start, optimizer.init(start)))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        *left, value = train(spread(net), *placed, *jax.device_put((x, target), batch))
        assert relative_error((*left, value), expected) <= 1e-10, how
        for leaf, sharding in zip(jax.tree.leaves(left), jax.tree.leaves(shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), how


class Collective(NamedTuple):
    """A collective operation in a compiled program: its shapes, and whether it is in a loop."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    looped: bool

    @property
    def elements(self):
        return sum(map(math.prod, self.shapes))


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(compiled):
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            shapes = tuple(tuple(int(n) for n in shape.split(",") if n) for shape in shapes)
            found.append(Collective(match[2], shapes, "/while/body" in line))
    return found


def compiled(f, net, x, place, batch, whole):
    """f of net, compiled for x, with params and grads where ``place`` puts them."""
    structs = jax.eval_shape(net.init, jax.random.key(0), x)
    placed = place(structs)
    target = jax.ShapeDtypeStruct(x.shape if x.dtype == int else x.shape[:-1], int)
    f = jax.jit(f, in_shardings=(placed, batch, batch), out_shardings=(whole, placed))
    return structs, f.lower(structs, x, target).compile()


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


ONE_AXIS = mesh_of(data=8)
WIDE = jp.models.gpt2(jp.models.Gpt2Config(vocab=88, length=10, features=32, heads=4, layers=3))
LONG = jax.ShapeDtypeStruct((8, 10), int)


def test_data_parallel_is_one_all_reduce():
    """All gradients and the loss in one; in a scan, the gradients of one layer at each step."""
    whole, batch = over(mesh=ONE_AXIS), over("data", mesh=ONE_AXIS)

    def place(tree):
        return jax.tree.map(lambda _: whole, tree)

    net = jp.chain(jp.Dense(16), jp.Gelu(), jp.skip(jp.Dense(16)), jp.Dense(8))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float64)
    params, program = compiled(jp.value_and_grad(net, LOSS), net, x, place, batch, whole)
    (only,) = collectives(program)
    assert only.kind == "all-reduce"
    assert only.elements == size(params) + 1

    params, program = compiled(jp.value_and_grad(WIDE, LOSS), WIDE, LONG, place, batch, whole)
    block, rest = collectives(program)
    assert {block.kind, rest.kind} == {"all-reduce"}
    assert (block.looped, rest.looped) == (True, False)
    table, (positions, stack, last) = params
    assert 3 * block.elements == size(stack)
    # A tied table has two shares. XLA for CPUs reduces each before it adds them.
    assert rest.elements == 2 * table.size + positions.size + size(last) + 1


def test_fully_sharded_gathers_params_and_nothing_else():
    whole, batch = over(mesh=ONE_AXIS), over("data", mesh=ONE_AXIS)

    def place(tree):
        return jp.sharding.fully_sharded(tree, ONE_AXIS, "data", smallest=16)

    net = jp.sharding.gathered(WIDE, ONE_AXIS)
    params, program = compiled(jp.value_and_grad(net, LOSS), net, LONG, place, batch, whole)
    assert all(sharding.spec for sharding in jax.tree.leaves(place(params)))
    table, (positions, stack, last) = params
    gathered = {"all-gather": [], "all-reduce": [], "reduce-scatter": [], "all-to-all": []}
    for collective in collectives(program):
        gathered[collective.kind].append(collective)

    one_layer = {leaf.shape[1:] for leaf in jax.tree.leaves(stack)}
    others = {leaf.shape for leaf in jax.tree.leaves((table, positions, last))}
    ids = (*LONG.shape, LONG.size)
    for collective in gathered["all-gather"]:
        (shape,) = collective.shapes
        squeezed = tuple(n for n in shape if n != 1)
        known = (
            one_layer if collective.looped else others | {table.shape[::-1], LONG.shape, ids[2:]}
        )
        assert squeezed in known, collective
    # Each gradient is summed once. (XLA for CPUs has no pass that makes a reduce-scatter from an
    # all-reduce of which a device keeps a slice; for GPUs and TPUs it has.) Of the table's two
    # shares, the rows' needs no sum: each device is sent its features of all rows' cotangents.
    sums = gathered["all-reduce"] + gathered["reduce-scatter"]
    assert sum(c.elements for c in sums if c.looped) * 3 == size(stack)
    assert sum(c.elements for c in sums if not c.looped) == size((table, positions, last)) + 1
    assert [c.elements for c in gathered["all-to-all"]] == [LONG.size * 32 // 8]
    # Per device, arguments and results are an eighth: params, ids, targets; gradients, and a loss.
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == 8 * (size(params) + 2 * LONG.size) // 8
    assert memory.output_size_in_bytes - 8 * size(params) // 8 in range(8, 1024)  # and a table


APART = [
    Row(jp.chain(jp.Dense(9), jp.LayerNorm(), jp.Dense(7)), normal(2, 5, 3)),
    Row(jp.chain(jp.Conv(3), jp.MaxPool(), jp.Conv(2)), normal(2, 6, 6, 2)),
    Row(jp.chain(jp.Embedding(11, 4), jp.Positions(5), jp.Lstm(3)), IDS[:2]),
]


def has_shares(row):
    params = jax.eval_shape(row.layer.init, jax.random.key(0), row.x)
    return bool(jax.tree.leaves(learned(params))) and not row.layer.batch_coupled


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize(
    "row",
    [*APART, *(pytest.param(row, marks=pytest.mark.full) for row in TABLE if has_shares(row))],
    ids=row_id,
)
def test_examples_stay_on_their_devices(row, each):
    """Loops over examples run over each device's own examples, and give the same numbers."""
    net, (params, x) = row.layer, at(row)
    x, loss, key = of_size(8 * each, x), jp.HalfSquaredError(), jax.random.key(2)
    target = normal(*jax.eval_shape(net.forward, params, x)[0].shape)
    asked = {
        "grads": jp.Gradient(),
        "each": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "clipped": jp.Clipped(0.3),
        "squares": jp.SecondMoment(),
        "variance": jp.Variance(),
        "diagonal": jp.DiagGGN(samples=1),
        "seen": jp.quantity.Projected(2, key),
    }
    batch = over("data", mesh=ONE_AXIS)
    placed = jax.device_put(params, over(mesh=ONE_AXIS)), *jax.device_put((x, target), batch)

    def gathers(f):
        program = jax.jit(f).lower(*placed, key=key).compile()
        others = {c.shapes for c in collectives(program) if c.kind != "all-reduce"}
        return others, program(*placed, key=key)

    found, got = gathers(jp.quantities(net, loss, **asked))
    by_autodiff, _ = gathers(jax.value_and_grad(jp.loss_fn(net, loss)))
    assert found <= by_autodiff  # XLA itself gathers for convolutions in groups
    expected = jax.jit(jp.quantities(net, loss, **asked))(params, x, target, key=key)
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_loop_over_devices_keeps_its_fallbacks_apart():
    """If a loop's body were mapped over lanes, a conditional would run both of its branches."""
    net, loss, batch = jp.Conv(64), jp.HalfSquaredError(), over("data", mesh=ONE_AXIS)
    params, x = at(Row(net, normal(32, 3, 3, 32)))
    norms = jax.jit(jp.per_example_sq_norms(net, loss))
    args = x, normal(32, 3, 3, 64)
    placed = jax.device_put(params, over(mesh=ONE_AXIS)), *jax.device_put(args, batch)
    assert " conditional(" in norms.lower(*placed).compile().as_text()
    assert relative_error(norms(*placed), norms(params, *args)) <= 1e-12


@pytest.mark.parametrize("axes", ["data", ("data", "model")], ids=str)
@pytest.mark.parametrize(
    "net", [jp.Conv(4, groups=2), jp.ConvTranspose(2, (3, 2), (2, 3))], ids=str
)
def test_convolutions_on_a_mesh_of_two_axes(net, axes):
    """XLA returns wrong numbers there for grouped convolutions, which a loop's lanes become."""
    params, x = at(Row(net, normal(8, 3, 4, 4)))
    batch = x, normal(*jax.eval_shape(net.forward, params, x)[0].shape)
    asked = {"variance": jp.Variance(), "diagonals": jp.DiagGGN(per_example=True)}
    f = jax.jit(jp.quantities(net, jp.HalfSquaredError(), grads=jp.Gradient(), **asked))
    got = f(jax.device_put(params, over()), *jax.device_put(batch, over(axes)))
    assert relative_error(got, f(params, *batch)) <= 1e-9


def test_tensor_parallel_dense_layers_talk_once_a_block_each_way():
    """Devices sum only the block's y and the d_x of its first dense layer."""
    mesh = mesh_of(model=8)
    d = 24
    inner = jp.chain(jp.LayerNorm(), jp.Dense(4 * d), jp.Gelu(), jp.Dense(d))
    net = jp.repeat(jp.skip(inner), 3)
    x = jax.ShapeDtypeStruct((5, 7, d), jnp.float64)

    def place(tree):
        return jp.sharding.tensor_parallel(tree, mesh, "model")

    whole = over(mesh=mesh)
    _, program = compiled(jp.value_and_grad(net, LOSS), net, x, place, whole, whole)
    rest = [c for c in collectives(program) if c.shapes != (x.shape,)]
    activations = [c for c in collectives(program) if c.shapes == (x.shape,)]
    assert [(c.kind, c.looped) for c in activations] == [("all-reduce", True)] * 2
    # On a CPU, Outer.sum transposes the gradient of a matrix that narrows through a flat array,
    # which XLA cannot keep split.
    assert all(c.kind == "all-gather" and c.shapes == ((d, 4 * d),) for c in rest)


def test_shard_map_keeps_per_example_quantities_apart():
    """Under jit, a scan over examples gathers them all; in shard_map, each device keeps its own."""
    net, *args = problem("gpt2")
    f, mesh, split = jp.per_example_sq_norms(net, LOSS), mesh_of(data=8), PartitionSpec("data")
    sharded = jax.shard_map(f, mesh=mesh, in_specs=(PartitionSpec(), split, split), out_specs=split)
    program = jax.jit(sharded).lower(*args).compile()
    assert collectives(program) == []
    placed = jax.device_put(tuple(args), program.input_shardings[0])
    assert relative_error(program(*placed), jax.jit(f)(*args)) <= 1e-12


@pytest.mark.full
def test_custom_vjp_under_shard_map():
    """Each device has its own examples, and the gradient is the mean over all, like autodiff's."""
    net, params, x, target = problem("gpt2")
    custom = jp.custom_vjp(net)

    def mean(params, x, target):
        def scalar(params):
            return LOSS.forward(custom(params, x), target)[0].mean()

        value, grads = jax.value_and_grad(scalar)(params)
        return jax.lax.pmean(value, "data"), jax.tree.map(lambda g: g / 4, grads)

    split = PartitionSpec("data")
    sharded = jax.shard_map(
        mean,
        mesh=mesh_of(data=4),
        in_specs=(PartitionSpec(), split, split),
        out_specs=PartitionSpec(),
    )
    got = jax.jit(sharded)(params, x, target)
    assert relative_error(got, jp.value_and_grad(net, LOSS)(params, x, target)) <= 1e-12


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_data_parallel_on_an_explicit_mesh(name, fused):
    """There, every array's type has its sharding, as on the meshes that JAX makes by default."""
    net, params, x, target = problem(name)
    update = jp.make_update(net, LOSS, optax.adam(1e-2, eps=1e-3), fused=fused, max_norm=0.1)
    start = jax.tree.map(np.asarray, (params, update.init(params)))
    expected = update(*jax.tree.map(jnp.asarray, start), x, target)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        start = jax.device_put(start, over(mesh=mesh))
        got = update(*start, *jax.device_put((x, target), over("data", mesh=mesh)))
    assert relative_error(got, expected) <= 1e-10


IMAGES = jp.chain(
    jp.Conv(4, groups=2), jp.MaxPool(), jp.ConvTranspose(2), jp.Conv(3), jp.Flatten(), jp.Dense(3)
)
RECURRENT = jp.chain(
    jp.Embedding(7, 4), jp.LayerNorm(), jp.Lstm(6), jp.Attention(1), jp.Gru(3), jp.frozen(jp.Rnn(2))
)
EXPLICIT = [
    Row(MLP, np.random.default_rng(0).normal(size=(3, 16))),
    Row(IMAGES, np.random.default_rng(0).normal(size=(3, 4, 4, 2))),
    Row(RECURRENT, np.random.default_rng(0).integers(0, 7, (3, 5))),
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("row", "within"),
    [
        *itertools.product(EXPLICIT, ("a context", "no context")),
        *((row, "a context") for row in first_of_their_kind(TABLE) if isinstance(row, Row)),
    ],
    ids=lambda value: value if isinstance(value, str) else row_id(value),
)
def test_every_quantity_on_an_explicit_mesh(row, within):
    net, (params, x) = row.layer, at(row)
    x = of_size(4, x)
    y, _ = jax.eval_shape(net.forward, params, x)
    target = jnp.asarray(np.random.default_rng(1).uniform(size=y.shape))
    key, loss, asked = jax.random.key(2), jp.HalfSquaredError(), {}
    if jax.tree.leaves(learned(params)) and not net.batch_coupled:
        asked = {
            "grads": jp.Gradient(),
            "each": jp.PerExampleGrads(),
            "norms": jp.SqNorms(),
            "gram": jp.Gram(),
            "gram by layer": jp.Gram(per_layer=True),
            "each diagonal": jp.DiagGGN(per_example=True),
            "variance": jp.Variance(),
            "noise": jp.NoiseScale(),
            "clipped": jp.Clipped(0.3, 1.0),
            "in two passes": jp.Clipped(0.3, two_pass=True),
            "diagonal": jp.DiagGGN(),
            "root": jp.GGNRoot(),
        }
        if row is EXPLICIT[0]:
            asked["kronecker"] = jp.KroneckerFactors()
    updates = [
        jp.make_update(net, loss, optax.sgd(0.1), fused=fused, max_norm=0.3, donate=False)
        for fused in (False, True)
    ]

    @jax.jit
    def f(params, x, target):
        results = {
            "value_and_grad": jp.value_and_grad(net, loss)(params, x, target, key=key),
            "updates": [it(params, it.init(params), x, target, key) for it in updates],
        }
        if asked:
            together = jp.quantities(net, loss, **asked)
            results |= together(params, x, target, key=key)
            in_parts = jp.per_example_sq_norms(net, loss, micro_batches=2)
            results["in parts"] = in_parts(params, x, target, key=key)
        return results

    expected = f(params, x, target)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh) if within == "a context" else contextlib.nullcontext():
        placed = jax.device_put(params, over(mesh=mesh))
        got = f(placed, *jax.device_put((x, target), over("data", mesh=mesh)))
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)
    if asked:
        assert not got["norms"].sharding.is_fully_replicated
        assert jax.tree.leaves(learned(got["grads"]))[0].sharding.is_fully_replicated


def test_rules():
    mesh = mesh_of(data=4, model=2)
    shapes = {
        "stack": (3, 64, 256),
        "both axes": (64, 6),
        "axis 0, as no other is divided": (64, 5),
        "indivisible": (7, 5),
        "bias": (8,),
        "small": (4,),
        "scalar": (),
    }
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    placed = jp.sharding.fully_sharded(structs, mesh, smallest=8)
    assert {name: tuple(sharding.spec) for name, sharding in placed.items()} == {
        "stack": (None, None, ("data", "model")),
        "both axes": (None, "model"),
        "axis 0, as no other is divided": (("data", "model"), None),
        "indivisible": (None, None),
        "bias": (("data", "model"),),
        "small": (None,),
        "scalar": (),
    }
    bits = jax.ShapeDtypeStruct((10, 6), jnp.float32)
    table = jp.sharding.tensor_parallel(bits, mesh, "model", vocab=10)
    assert tuple(table.spec) == ("model", None)
    assert tuple(jp.sharding.tensor_parallel(bits, mesh, "model").spec) == (None, None)
    with pytest.raises(ValueError, match=r"the mesh has the axes \('data', 'model'\), and no 'x'"):
        jp.sharding.fully_sharded(bits, mesh, "x")
    with pytest.raises(TypeError, match="the mesh is not a Mesh but 'data'"):
        jp.sharding.gathered(GPT, "data")
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    for rule in (
        jp.sharding.gathered,
        jp.sharding.fully_sharded,
        lambda tree, mesh: jp.sharding.tensor_parallel(tree, mesh, "data"),
    ):
        with pytest.raises(ValueError, match="the mesh must be one of Auto axes, not"):
            rule(() if rule is not jp.sharding.gathered else GPT, explicit)
    with pytest.raises(TypeError, match="params have a place, a net has none"):
        jp.sharding.fully_sharded(GPT, mesh)


def test_rules_for_what_an_optimizer_keeps():
    """Masks leave holes in the params' structure, a factored state has other shapes, and so on."""
    mesh = mesh_of(data=4, model=2)
    params = jp.AffineParams(jnp.ones((8, 32)), jnp.ones(32))
    no_bias = jp.AffineParams(True, False)
    optimizer = optax.chain(
        optax.masked(optax.trace(0.9), no_bias),
        optax.masked(optax.trace(0.9), jp.AffineParams(False, True)),
        optax.scale_by_factored_rms(min_dim_size_to_factor=4),
    )
    tree = (optimizer.init(params), 0.1)
    specs = jax.tree.map(
        lambda sharding: tuple(sharding.spec), jp.sharding.tensor_parallel(tree, mesh, "model")
    )
    of_w, of_b, factored = specs[0]
    assert of_w.inner_state.trace.w == (None, "model")
    assert of_b.inner_state.trace.b == (None,)
    assert factored.v_row.w == factored.v_col.w == (None,)
    assert specs[1] == ()
    split = jp.sharding.fully_sharded(tree, mesh, smallest=16)
    assert tuple(split[0][0].inner_state.trace.w.spec) == (None, ("data", "model"))
    assert jax.tree.structure(split) == jax.tree.structure(tree)


@pytest.mark.full
def test_plan_prints_what_a_step_needs():
    sizes = ("--layers", 8, "--features", 512, "--heads", 4, "--vocab", 5000, "--length", 256)
    out = run("plan.py", *sizes, "--devices", 8)
    assert max(map(len, out.splitlines())) <= 80
    rows = re.findall(r"^ +(8) ([a-z].*?) +(\d+\.\d.*)$", out, re.MULTILINE)
    needs = {(int(n), way): [float(word) for word in rest.split()] for n, way, rest in rows}
    assert len(needs) == 5
    init = jp.models.gpt2(jp.models.Gpt2Config(5000, 256, 512, 4, 8)).init
    params = size(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 256), int)))
    assert f"{params / 1e6:,.1f} M params" in out
    for (devices, way), (stays, adds, total, by_hand, *_) in needs.items():
        assert stays == pytest.approx(12 * params / 1e9 / devices, abs=0.006)
        assert total == pytest.approx(stays + adds, abs=0.011)
        if "float32" in way:
            assert total == pytest.approx(by_hand, rel=0.1)
    for way in ("float32", "bfloat16 recompute"):
        assert needs[8, f"{way} fused"][1] < needs[8, way][1]
