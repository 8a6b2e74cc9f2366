"""Programs compiled for devices that are not there, and the costs read from their text."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprop as jp
from jaxprop import cli
from jaxprop.bench import case, networks
from jaxprop.bench.target import compiled as target, hlo, picture

TEXT = """\
HloModule jit_f

%body (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0:T(8)}) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"10"}
  ROOT %all-gather.1 = (s32[], f32[8]) all-gather(%fusion.1), dimensions={0}
}

%condition (b: (s32[], f32[8])) -> pred[] {
  %b = (s32[], f32[8]) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%b, %bound), direction=LT, backend_config={"estimated_cycles":"1"}
}

%cheap (c: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} parameter(0)
}

%dear (d: f32[8]) -> f32[8] {
  %d = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce-start(%d), backend_config={"estimated_cycles":"100"}
}

%f (e: f32[8]) -> f32[8] {
  ROOT %e = f32[8]{0} parameter(0)
}

ENTRY %main.5 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %sums = f32[1]{0} fusion(%x), calls=%all-reduce-scatter, backend_config={"estimated_cycles":"5"}
  %while.1 = (s32[], f32[8]) while(%x), condition=%condition, body=%body
  %open = (s32[], f32[8]) while(%x), condition=%f, body=%f
  ROOT %either = f32[8]{0} conditional(%x, %x, %x), branch_computations={%cheap, %dear}
}
"""


def test_cost_of_a_program_counts_loops_and_both_branches():
    cost = hlo.cost(TEXT)
    assert cost.cycles == 5 + 7 * (10 + 1)
    assert cost.worst_cycles == cost.cycles + 100
    assert cost.collectives == {"reduce-scatter": 1, "all-gather": 7, "all-reduce": 1}
    assert cost.open_loops == 1


def test_cost_of_a_program_for_the_cpu_has_its_collectives():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, PartitionSpec("batch")))
    cost = hlo.cost(jax.jit(lambda x: x.sum(axis=0)).lower(x).compile().as_text())
    assert cost.collectives == {"all-reduce": 1}
    assert cost.cycles == 0


@pytest.mark.parametrize(("name", "extra"), [("v5e", "tpu"), ("h100", "h100")])
def test_without_its_compiler_a_target_says_what_to_install(name, extra, monkeypatch, capsys):
    monkeypatch.setattr(target, "_has", lambda module: False)
    with pytest.raises(ImportError, match=rf"jaxprop-vjp\[{extra}\]"):
        target.target_devices(name)
    assert cli.main(["bench", "--target", name, "--only", "mlp-2x256"]) == 2
    assert f"pip install 'jaxprop-vjp[{extra}]'" in capsys.readouterr().err


def test_another_name_or_number_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no target v99; there are v5e, v5p, v6e, h100"):
        target.target_devices("v99")
    monkeypatch.setattr(target, "_has", lambda module: True)
    with pytest.raises(ValueError, match="v5e has 1, 4, 8 devices, not 3"):
        target.target_devices("v5e", 3)
    with pytest.raises(ValueError, match="up to 8 devices or nodes of 8, not 12"):
        target.target_devices("h100", 12)


def test_a_picture_has_a_panel_for_what_the_compiler_tells():
    def row(**ratio):
        return {"ratio": {"cycles": None, "worst": None, "temp": None, **ratio}}

    of_gpu = {"device": "a GPU", "rows": {"mlp": row(live=0.5), "gpt": row(live=None)}}
    assert len(picture.draw(of_gpu).axes) == 1
    of_tpu = {"device": "a TPU", "rows": {"mlp": row(cycles=1.0, live=0.5)}}
    cycles, live = picture.draw(of_tpu).axes
    assert [label.get_text() for label in cycles.get_yticklabels()] == ["mlp"]
    assert [text.get_text() for text in live.texts] == ["0.50"]


def test_options_that_would_do_nothing_are_refused(capsys):
    assert cli.main(["bench", "--target", "v5e", "--quick"]) == 2
    assert "with --target nothing is run" in capsys.readouterr().err
    assert cli.main(["bench", "--plot", "bench.png"]) == 2
    assert "add one of them" in capsys.readouterr().err


needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs [tpu]")
needs_h100 = pytest.mark.skipif(not target._has("jax_plugins.xla_cuda12"), reason="needs [h100]")


def on(device, make, *args, carried=0):
    """The cost of a function on a device, for arguments with these shapes."""
    args = target.placed(args, device)
    donated = tuple(range(carried))
    return target.build_of(jax.jit(make, donate_argnums=donated).lower(*args).compile())


@pytest.fixture
def float32():
    """The bench's precision; TPUs have no real float64."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@needs_tpu
@pytest.mark.usefixtures("float32")
def test_on_a_tpu_the_gradient_costs_what_autodiffs_does():
    (device,) = target.target_devices("v5e")
    net, loss, args = networks.mlp(batch=128)
    hand = case.Case(
        lambda: jp.value_and_grad(net, loss),
        lambda: jax.value_and_grad(jp.loss_fn(net, loss)),
        args,
    )
    ours, theirs = target.built(hand, device)
    assert ours.cost.cycles <= 1.001 * theirs.cost.cycles
    assert ours.cost.cycles > 10_000


@needs_tpu
@pytest.mark.usefixtures("float32")
def test_on_a_tpu_max_pooling_is_select_and_scatter():
    """3 x 3 with stride 2 on 64 x 28 x 28 x 64: 124 kilocycles, where tap by tap takes 852."""
    (device,) = target.target_devices("v5e")
    pool = jp.MaxPool((3, 3), strides=2, padding="SAME")

    def pulled(x, ct):
        y, residuals = pool.forward((), x)
        return y, pool.backward((), residuals, ct)[1]

    x, ct = jnp.zeros((64, 28, 28, 64), jnp.float32), jnp.zeros((64, 14, 14, 64), jnp.float32)
    assert on(device, pulled, x, ct).cost.cycles < 300_000


@needs_tpu
@pytest.mark.full
@pytest.mark.usefixtures("float32")
def test_on_a_tpu_a_fused_update_holds_no_gradients():
    (device,) = target.target_devices("v5e")
    net, loss = jp.repeat(jp.chain(jp.Dense(1024), jp.Tanh()), 16), jp.HalfSquaredError()
    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    optimizer = optax.sgd(1e-2)
    state = optimizer.init(params)
    of = functools.partial(jp.make_update, net, loss, optimizer)
    differentiate = lambda net, loss: jax.value_and_grad(jp.loss_fn(net, loss))  # noqa: E731
    args = params, state, x, x
    fused = on(device, of(fused=True), *args, carried=2)
    plain = on(device, of(value_and_grad=differentiate), *args, carried=2)
    assert 50 * fused.temp_bytes < plain.temp_bytes


@needs_tpu
@pytest.mark.full
@pytest.mark.usefixtures("float32")
def test_on_tpus_fully_sharded_gradients_are_scattered():
    """No reduced matrix is whole on any device."""
    devices = target.target_devices("v5e", 8)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,), devices=devices)
    net, loss = jp.chain(jp.Dense(1024), jp.Relu(), jp.Dense(1024)), jp.HalfSquaredError()
    net = jp.sharding.gathered(net, mesh)
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)

    def put(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = jax.tree.map(put, params, jp.sharding.fully_sharded(params, mesh))
    x = put(x, NamedSharding(mesh, PartitionSpec("batch")))
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)
    update = jp.make_update(net, loss, optimizer)
    compiled = update.lower(params, state, x, x).compile()
    scattered = [line for line in compiled.as_text().splitlines() if "=%all-reduce-scatter" in line]
    assert sum(line.count("f32[1024,128]") for line in scattered) == 2
    collectives = target.build_of(compiled).cost.collectives
    assert collectives["reduce-scatter"] == len(scattered)
    assert collectives["all-gather"] >= 2


saving = functools.partial(jp.Attention, save="logsumexp", kernels=True)


def attended(layer, target, n, t, d, dtype, count):
    """The program of forward and backward, with padding, examples split over devices."""
    devices = jp.bench.target_devices(target, count)
    mesh = jax.make_mesh((count,), ("n",), axis_types=(AxisType.Auto,), devices=devices)
    spec = PartitionSpec("n")

    def both(x, ct, mask):
        y, residuals = layer.forward(layer.bind((), mask=mask), x)
        return y, layer.backward(layer.bind((), mask=mask), residuals, ct)[1]

    if target != "h100":  # XLA does not split kernels over TPUs
        both = jax.shard_map(both, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    kv_heads = layer.kv_heads or layer.heads
    shapes = (n, t, (layer.heads + 2 * kv_heads) * d), (n, t, layer.heads * d), (n, t)
    structs = (
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
        for shape, kind in zip(shapes, (dtype, dtype, bool), strict=True)
    )
    return jax.jit(both).lower(*structs).compile()


TARGETS = [
    pytest.param("v5e", "tpu_custom_call", marks=needs_tpu),
    pytest.param("h100", "__gpu$xla.gpu.triton", marks=needs_h100),
]


@pytest.mark.full
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("name", "call"), TARGETS)
def test_attention_is_three_kernels_whose_memory_is_linear_in_t(name, call):
    layer = saving(2)
    live = {}
    for t in (2048, 8192):
        program = attended(layer, name, 2, t, 128, jnp.bfloat16, count=1)
        assert program.as_text().count(f'custom_call_target="{call}"') == 3
        live[t] = target.build_of(program).live_bytes
    assert live[8192] <= 4.5 * live[2048]
    weights = attended(jp.Attention(2), name, 2, 2048, 128, jnp.bfloat16, count=1)
    assert 2 * live[2048] < target.build_of(weights).live_bytes


@pytest.mark.full
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("name", "call"), TARGETS)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    ("layer", "t", "d", "dtype"),
    [
        (saving(2), 300, 40, "float32"),
        (
            saving(4, kv_heads=2, window=100),
            1024,
            64,
            "bfloat16",
        ),
        (
            saving(2, causal=False, window=7),
            37,
            8,
            "bfloat16",
        ),
        (saving(1, causal=False), 1, 256, "float32"),
    ],
    ids=["odd", "groups", "short", "one position"],
)
def test_attentions_kernels_compile(name, call, count, layer, t, d, dtype):
    text = attended(layer, name, 8, t, d, jnp.dtype(dtype), count).as_text()
    assert text.count(f'custom_call_target="{call}"') == 3
    assert not any(f" {moved}(" in text for moved in ("all-gather", "all-reduce", "all-to-all"))


@pytest.mark.full
@pytest.mark.parametrize(("name", "call"), TARGETS)
@pytest.mark.parametrize("causal", [True, False])
def test_attentions_kernels_compile_with_x64(name, call, causal):
    layer = saving(4, causal, kv_heads=2, window=20 if causal else None)
    text = attended(layer, name, 2, 300, 40, jnp.float32, count=1).as_text()
    assert text.count(f'custom_call_target="{call}"') == 3


@needs_h100
@pytest.mark.full
@pytest.mark.usefixtures("float32")
def test_on_an_h100_programs_have_a_memory_and_no_cycles(capsys, tmp_path):
    path = tmp_path / "figures.json"
    assert cli.main(["bench", "--target", "h100", "--only", "mlp-2x256", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Compiled for one NVIDIA H100" in printed
    assert "none of a GPU" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert '"compiled_not_run": true' in path.read_text()


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param("v5e", marks=needs_tpu), pytest.param("h100", marks=needs_h100)]
)
def test_the_command_needs_no_driver_and_no_setting(name):
    argv = [sys.executable, "-m", "jaxprop", "bench", "--target", name, "--only", "mlp-2x256"]
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", *target.TPU)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert (done.returncode, "Compiled for one" in done.stdout) == (0, True), done.stderr
    assert "Traceback" not in done.stderr
