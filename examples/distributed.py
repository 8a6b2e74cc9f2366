"""Train the GPT of gpt.py on many processes, each with its own devices.

    python examples/distributed.py
    python examples/distributed.py --coordinator HOST:1234 --processes 2 --process 0
    python examples/distributed.py --coordinator HOST:1234 --processes 2 --process 1

The last two commands belong to one run, and HOST is the machine of process 0. The batch, the params
and the optimizer state are sharded over all devices of all processes, and ``jit`` inserts the
communication. The windows of a step depend only on the seed and the step, and each process reads
the windows of its own devices. The result is the same, up to rounding, on any number of devices.

When one process dies, the others stop. With ``--checkpoints DIR``, a directory that all processes
share, ``--resume`` continues the run, also on a different number of processes.
"""

import argparse
import math
import os
import sys
import threading
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import Checkpoints
from corpus import load, starts
from gpt import LOSS, make_net
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from options import Parser, above_zero, natural, positive, reader_left, run

import jaxprop as jp

SIZES = ("steps", "batch", "length", "layers", "features", "heads")


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return the bytes of each window and the byte that follows it, (N, length + 1)."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def train(args: argparse.Namespace, checkpoints: Checkpoints | None) -> None:
    """Train the GPT on all devices of all processes; process 0 prints the reports."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    if args.batch % mesh.size:
        sys.exit(f"--batch {args.batch} is not a multiple of the {mesh.size} devices")
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["devices"], []))
    net = jp.sharding.gathered(make_net(args), mesh)
    update = jp.make_update(
        net, LOSS, optax.adam(optax.cosine_decay_schedule(args.rate, args.steps))
    )

    def begin(key: Any) -> Any:
        params = net.init(key, jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32))
        return {"params": params, "state": update.init(params), "done": jnp.int32(0)}

    key = jax.random.key(args.seed)
    shardings = jp.sharding.fully_sharded(jax.eval_shape(begin, key), mesh)

    def one(run: Any, cut: Any) -> tuple[Any, Any]:
        params, state, value = update(run["params"], run["state"], cut[:, :-1], cut[:, 1:])
        return {"params": params, "state": state, "done": run["done"] + 1}, value

    step = jax.jit(one, donate_argnums=0, out_shardings=(shardings, whole))
    run = jax.jit(begin, out_shardings=shardings)(key)
    if checkpoints is not None:
        run = checkpoints.restore(run)

    def say(line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)

    size = sum(leaf.size for leaf in jax.tree.leaves(run["params"]))
    say(f"{size:,} params; devices: {mesh.size}, processes: {jax.process_count()}")
    first = int(run["done"])
    if first:
        say(f"resumed after step {first}")
    text, _ = load(args.seed)
    order = starts(args.seed, args.steps, args.batch, args.length, text)

    def batch(starts: np.ndarray) -> jax.Array:
        """Return the windows as one sharded array; each process reads only its own rows."""

        def read(index: Any) -> np.ndarray:
            return windows(text, starts[index[0]], args.length)

        return jax.make_array_from_callback((args.batch, args.length + 1), rows, read)

    each, start, values = math.ceil(args.steps / args.reports), time.perf_counter(), []
    for done, at in enumerate(order[first:], first + 1):
        run, value = step(run, batch(at))
        values.append(value)
        if done % each == 0 or done == args.steps:
            if checkpoints is not None:
                checkpoints.save(done, run)
            bits = np.mean(jax.device_get(values)) / math.log(2)
            say(f"step {done:6d}  {bits:.4f} bits per byte  {time.perf_counter() - start:5.0f} s")
            values = []


def main() -> None:
    parser = Parser("Train a GPT on many machines.")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    parser.add(
        ("processes", positive, 1, "number of processes"),
        ("process", natural, 0, "index of this process"),
        ("timeout", positive, 30, "seconds until a silent process is dead"),
        ("steps", positive, 1000, "training steps"),
        ("batch", positive, 16, "windows per step, over all devices"),
        ("length", positive, 128, "bytes per window"),
        ("layers", positive, 6, "number of blocks"),
        ("features", positive, 256, "width of the model"),
        ("heads", positive, 4, "attention heads"),
        ("rate", above_zero, 1e-3, "initial learning rate of Adam"),
        ("reports", positive, 10, "number of reports"),
        ("seed", natural, 0, "seed of the run"),
    )
    parser.add_checkpoints("at every report")
    parser.set_defaults(dtype="float32", recompute=False)
    args = parser.parse()
    if args.process >= args.processes:
        parser.error("--process is from 0 to one less than --processes")
    if args.processes > 1 and args.coordinator is None:
        parser.error("--processes needs --coordinator HOST:PORT")

    if args.processes > 1:
        jax.distributed.initialize(
            args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=args.timeout
        )
    checkpoints = None
    if args.checkpoints is not None:
        settings = {name: getattr(args, name) for name in (*SIZES, "rate", "seed")}
        checkpoints = Checkpoints(args.checkpoints, settings, args.resume)
    try:
        train(args, checkpoints)
    except Exception as error:
        if not reader_left(error):
            traceback.print_exc()
        print(f"process {args.process} stops, and the others with it", file=sys.stderr)
        if checkpoints is not None:  # a pending save may wait for a process that has died
            saving = threading.Thread(target=checkpoints.close, daemon=True)
            saving.start()
            saving.join(args.timeout)
        # sys.exit would wait for the other processes, which wait for this one
        os._exit(1)
    if checkpoints is not None:
        checkpoints.close()


if __name__ == "__main__":
    run(main)
