"""Print what a training step of a large GPT needs on 1, 8 and 512 GPUs, without running it.

    python examples/plan.py
    python examples/plan.py --devices 512 --batch 4
    python examples/plan.py --layers 12 --features 768 --heads 12 --devices 1
    python examples/plan.py --target h100  # pip install 'jaxprop-vjp[h100]'
    python examples/plan.py --target h100 --save logsumexp

The default model is GPT-2 XL, with 1.5 B params. The step of ``jp.make_update`` with Adam is
compiled from shapes alone, for a mesh of simulated CPU devices. Params, optimizer state and batch
are sharded over all of them (``jp.sharding``). The bytes come from ``compiled.memory_analysis()``.
They are those of XLA for CPUs, whose fusions and buffers differ from a GPU's, or with ``--target``
those of XLA for an H100, which need not be present. Next to them the script prints a calculation by
hand, and lower bounds on the time of a step from NVIDIA's data sheet of the H100. Nothing is
measured on a GPU.
"""

import argparse
import os
from typing import Any, NamedTuple

from options import Parser, positive, run

GPU = {"bytes": 80e9, "bfloat16": 989e12, "float32": 495e12, "memory": 3.35e12}
NODE = 8  # GPUs that share NVLink, 450 GB/s each way; the node's 8 network cards take 400 GB/s in
LINK = {"node": 450e9, "network": 400e9}
WIDTH = {"bfloat16": 2, "float32": 4}


class Way(NamedTuple):
    """A way to compute the step.

    Attributes:
        dtype: the dtype of the computation.
        recompute: whether the residuals of a block are recomputed in the backward pass (remat).
        fused: whether params are updated during the backward pass.
    """

    dtype: str
    recompute: bool = False
    fused: bool = False

    def __str__(self) -> str:
        said = (self.dtype, "recompute" * self.recompute, "fused" * self.fused)
        return " ".join(filter(None, said))


class Need(NamedTuple):
    """The memory that one device needs, in bytes.

    Attributes:
        stays: the memory held between steps.
        adds: the most that a step adds to it.
    """

    stays: float
    adds: float


def compiled(args: argparse.Namespace, way: Way, devices: int) -> Need:
    """Return the memory of the step as XLA compiles it."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jaxprop as jp
    from jaxprop.bench import target_devices

    axes = ("node", "gpu")
    every = target_devices(args.target, devices) if args.target else jax.devices()
    mesh = jax.make_mesh(
        (max(devices // NODE, 1), min(devices, NODE)),
        axes,
        axis_types=(AxisType.Auto,) * 2,
        devices=every[:devices],
    )

    def placed(structs: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            structs,
            shardings,
        )

    options = {"save": args.save, "kernels": bool(args.target)}
    net = jp.models.gpt2(config(args), recomputing=way.recompute, **options)
    ids = jax.ShapeDtypeStruct((devices * args.batch, args.length), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), ids)
    optimizer = optax.adam(1e-4)
    state = jax.eval_shape(optimizer.init, params)
    if devices > 1:
        net = jp.sharding.gathered(net, mesh)
    net = net if way.dtype == "float32" else jp.cast(net, way.dtype)
    update = jp.make_update(net, jp.CrossEntropy(), optimizer, fused=way.fused)
    params, state = (
        placed(tree, jp.sharding.fully_sharded(tree, mesh)) for tree in (params, state)
    )
    ids = placed(ids, NamedSharding(mesh, PartitionSpec(axes)))
    memory = update.lower(params, state, ids, ids).compile().memory_analysis()
    assert memory is not None
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Need(memory.argument_size_in_bytes, memory.temp_size_in_bytes + new)


def config(args: argparse.Namespace) -> Any:
    """Return the configuration of the model."""
    from jaxprop.models import Gpt2Config

    return Gpt2Config(args.vocab, args.length, args.features, args.heads, args.layers)


def count(args: argparse.Namespace) -> tuple[int, int]:
    """Return the number of params in the embedding table, and in total."""
    d = args.features
    table = args.vocab * d
    block = (4 + 8) * d**2 + (3 + 1 + 4 + 1 + 4) * d  # dense layers; their biases and two norms
    return table, table + args.length * d + args.layers * block + 2 * d


def residuals(args: argparse.Namespace, way: Way) -> tuple[float, float]:
    """Return the bytes of one example's residuals in a block, and at the logits."""
    t, d, width = args.length, args.features, WIDTH[way.dtype]
    # The x of the two skips, the x of the four dense layers, q, k and v, and the input of gelu.
    rows = t * d * (2 + (1 + 1 + 1 + 4) + 3 + 4)
    weights = args.heads * t**2 * 9 / 16  # in 8 parts, each with the keys up to its last query
    kept = width * weights if args.save == "weights" else 4 * args.heads * t
    return width * rows + kept, (4 + 4) * t * args.vocab  # softmax and its ct, in float32


def arithmetic(args: argparse.Namespace, way: Way, devices: int) -> Need:
    """Return the memory of the step as calculated by hand."""
    table, params = count(args)
    block, logits = (args.batch * each for each in residuals(args, way))
    x = args.batch * args.length * args.features * WIDTH[way.dtype]
    kept = args.layers * x + block if way.recompute else args.layers * block
    gathered = 4 * table if devices > 1 else 0
    gradients = 4 * (table if way.fused else params) / devices
    # The table has two gradients, from the logits and from the embedded rows. The logits are freed
    # before the blocks' gradients exist.
    adds = kept + max(logits + 4 * table + gathered, gradients + 2 * 4 * table)
    return Need(3 * 4 * params / devices, adds)


def least_times(args: argparse.Namespace, way: Way, devices: int) -> tuple[float, float, float]:
    """Return lower bounds, in seconds, for the matmuls, the memory and the links of one GPU."""
    table, params = count(args)
    tokens, d = args.batch * args.length, args.features
    width = WIDTH[way.dtype]
    dense = table + 12 * args.layers * d**2
    attention = args.layers * args.length * d  # q k^T and p v; the causal mask leaves half
    flops = 6 * tokens * (dense + attention)
    flops += way.recompute * 2 * tokens * (dense - table + attention)

    block, logits = (args.batch * each for each in residuals(args, way))
    passes = 3 if way.recompute else 2
    moved = passes * width * params + 2 * (args.layers * block + logits)
    moved += 8 * 4 * params / devices  # g is written; Adam reads p, g, m, v, writes p, m, v

    exchanged = (2 * width + 4) * params * (1 - 1 / devices)  # two gathers, one sum of gradients
    link = LINK["network" if devices > NODE else "node"]
    return flops / GPU[way.dtype], moved / GPU["memory"], exchanged / link


def table(args: argparse.Namespace, ways: list[Way]) -> None:
    """Print a row for each number of devices and each way."""
    _, params = count(args)
    of = "an H100" if args.target else "CPUs"
    print(
        f"{params / 1e6:,.1f} M params, {args.batch} x {args.length} tokens a device and step.\n"
        f"GB a device: compiled by XLA for {of}, and by arithmetic. ms a step: what an\n"
        "H100's matmuls, memory and links need at least, by its data sheet.\n"
    )
    print(
        f"{'GPUs':>4} {'':24}{'stays':>6}{'adds':>7}{'sum':>7}{'by hand':>10}"
        f"{'matmul':>9}{'HBM':>6}{'link':>6}"
    )
    for devices in args.devices:
        for way in ways:
            need, by_hand = compiled(args, way, devices), sum(arithmetic(args, way, devices))
            matmul, memory, link = (1e3 * s for s in least_times(args, way, devices))
            print(
                f"{devices:4d} {way!s:24}{need.stays / 1e9:6.2f}{need.adds / 1e9:7.2f}"
                f"{said(sum(need)):>8}{said(by_hand):>9}{matmul:9.1f}{memory:6.1f}{link:6.1f}",
                flush=True,
            )
    print("\n! more than the 80 GB of an H100")


def said(size: float) -> str:
    """Return a number of bytes in GB, marked by ``!`` if it exceeds the memory of an H100."""
    return f"{size / 1e9:.2f}{' !'[size > GPU['bytes']]}"


def main() -> None:
    parser = Parser("What a step of a large GPT needs.")
    parser.add(
        ("layers", positive, 48, "number of blocks"),
        ("features", positive, 1600, "width of the model"),
        ("heads", positive, 25, "attention heads"),
        ("vocab", positive, 50257, "number of tokens in the vocabulary"),
        ("length", positive, 1024, "tokens per example"),
        ("batch", positive, 8, "examples per device"),
    )
    parser.add_argument(
        "--save",
        choices=["weights", "logsumexp"],
        default="weights",
        metavar="WHAT",
        help="weights or logsumexp, for backward (default: weights)",
    )
    parser.add_argument(
        "--target",
        choices=["h100"],
        help="the device to compile for (default: this machine's CPUs)",
    )
    parser.add_argument(
        "--devices",
        type=positive,
        nargs="+",
        default=[1, 8, 512],
        metavar="N",
        help="numbers of GPUs (default: 1 8 512)",
    )
    args = parser.parse()
    if args.features % args.heads:
        parser.error("--heads must divide --features")
    if any(n > NODE and n % NODE for n in args.devices):
        parser.error(f"--devices: up to {NODE}, or whole nodes of {NODE}")
    os.environ["XLA_FLAGS"] = (  # before JAX looks for devices
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
        f"--xla_force_host_platform_device_count={max(args.devices)}"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hide XLA's warnings on sharding
    narrow = Way("bfloat16", recompute=True)
    ways = [Way("float32"), Way("float32", fused=True), Way("bfloat16"), narrow]
    table(args, [*ways, narrow._replace(fused=True)])


if __name__ == "__main__":
    run(main)
