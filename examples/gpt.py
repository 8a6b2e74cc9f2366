"""Train a byte-level GPT to write Python, on the source files of the standard library.

    python examples/gpt.py
    python examples/gpt.py --auto --steps 200
    python examples/gpt.py --dtype bfloat16 --recompute --fused
    python examples/gpt.py --checkpoints runs/gpt                  (interrupt it at any time, then)
    python examples/gpt.py --checkpoints runs/gpt --resume

The model has pre-norm blocks in one ``repeat``, learned positions, and an embedding tied to the
output. A tenth of the files is held out, and the loss on windows of them is reported in bits per
byte. The steps between two reports are one ``lax.scan``. ``examples/peers/torch_gpt_train.py``
trains the same network on the same windows in PyTorch.
"""

import argparse
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from checkpoints import Checkpoints
from corpus import load, show, starts
from options import Parser, above_zero, natural, picture, positive, run
from scanning import make_steps
from watching import Watch, draw, gradients

import jaxprop as jp

LOSS = jp.CrossEntropy()
SYMBOLS = 128


def make_net(args: argparse.Namespace) -> Any:
    """Return the GPT that the options describe."""
    d = args.features
    block = jp.chain(
        jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(3 * d), jp.Attention(args.heads), jp.Dense(d))),
        jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(4 * d), jp.Gelu(), jp.Dense(d))),
    )
    block = jp.recompute(block) if args.recompute else block
    body = jp.chain(jp.Positions(args.length), jp.repeat(block, args.layers), jp.LayerNorm())
    net = jp.tied(jp.Embedding(SYMBOLS, d), body)
    return net if args.dtype == "float32" else jp.cast(net, args.dtype)


def windows(text: Any, starts: Any, length: int) -> tuple[Any, Any]:
    """Return the bytes of each window, (N, length), and the byte after each of them."""
    cut = text[starts[:, None] + jnp.arange(length + 1)].astype(jnp.int32)
    return cut[:, :-1], cut[:, 1:]


@functools.partial(jax.jit, static_argnames=("net", "context", "length"))
def sample(net: Any, params: Any, key: Any, context: int, length: int) -> Any:
    """Return ``length`` bytes, each drawn at temperature 0.7 given the last ``context`` bytes."""

    def step(seen: Any, key: Any) -> tuple[Any, Any]:
        logits, _ = net.forward(params, seen[None])
        drawn = jax.random.categorical(key, logits[0, -1].astype(jnp.float32) / 0.7)
        return jnp.append(seen[1:], drawn), drawn

    newlines = jnp.full(context, ord("\n"), jnp.int32)
    return jax.lax.scan(step, newlines, jax.random.split(key, length))[1]


def train(args: argparse.Namespace) -> float:
    """Train the GPT, print reports and a sample, and return the final held-out bits per byte."""
    text, held_out = load(args.seed)
    order = starts(args.seed, args.steps, args.batch, args.length, text)
    text, order = jnp.asarray(text), jnp.asarray(order)
    net = make_net(args)
    schedule = optax.warmup_cosine_decay_schedule(
        0, args.rate, min(100, args.steps // 2), args.steps
    )
    optimizer = optax.adam(schedule, b2=0.95)
    differentiate = jp.autodiff if args.auto else None
    update = jp.make_update(
        net, LOSS, optimizer, fused=args.fused, max_norm=1.0, value_and_grad=differentiate
    )
    steps = make_steps(update, lambda starts: windows(text, starts, args.length))

    at = jnp.asarray(starts(args.seed + 1, 8, 32, args.length, held_out))
    held_out = jnp.asarray(held_out)

    @jax.jit
    def bits(params: Any) -> Any:
        def of(at: Any) -> Any:
            return jp.loss_fn(net, LOSS)(params, *windows(held_out, at, args.length))

        return jax.lax.map(of, at).mean() / math.log(2)

    for_init, for_sample = jax.random.split(jax.random.key(args.seed))
    params = net.init(for_init, windows(text, order[0], args.length)[0])
    run = {"params": params, "state": update.init(params), "done": jnp.zeros((), jnp.int32)}
    checkpoints = None
    if args.checkpoints is not None:
        names = ("steps", "batch", "length", "layers", "features", "heads", "rate", "seed", "dtype")
        settings = {name: getattr(args, name) for name in names}
        checkpoints = Checkpoints(args.checkpoints, settings, args.resume)
        run = checkpoints.restore(run)

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} params, {len(text):,} bytes to train on", flush=True)
    each, first, held = math.ceil(args.steps / args.reports), int(run["done"]), math.nan
    few = windows(text, order[0][:8], args.length)
    seen, start = [], time.perf_counter()
    with Watch("step", args.steps, first, gradients(net, LOSS, *few)) as watch:
        for done in range(first, args.steps, each):
            rows = order[done : done + each]
            params, state, value = steps(run["params"], run["state"], rows)
            done += len(rows)
            run = {"params": params, "state": state, "done": jnp.asarray(done, jnp.int32)}
            watch.update(done, rows.size, value, params)
            held = float(bits(params))
            watch.print(
                f"step {done:6d}  train {value / math.log(2):.3f}  "
                f"held out {held:.3f} bits per byte  {time.perf_counter() - start:5.0f} s"
            )
            if args.plot is not None:
                seen.append((done, jp.explain(net, LOSS, params, *few, keep=0)))
            if checkpoints is not None:
                checkpoints.save(done, run)
    if checkpoints is not None:
        checkpoints.close()
    if args.plot is not None:
        draw(net, LOSS, run["params"], *few, seen, "step", args.plot)
    print("a sample:")
    print(show(sample(net, run["params"], for_sample, args.length, args.sample)))
    return held


def main() -> None:
    parser = Parser("Train a GPT to write Python.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--hand", action="store_true", help="differentiate by the hand-written chain (default)"
    )
    how.add_argument("--auto", action="store_true", help="differentiate by autodiff")
    how.add_argument(
        "--fused",
        action="store_true",
        help="by hand, and update on the way back",
    )
    parser.add(
        ("steps", positive, 2000, "training steps"),
        ("batch", positive, 16, "windows per step"),
        ("length", positive, 128, "bytes per window"),
        ("layers", positive, 6, "number of blocks"),
        ("features", positive, 256, "width of the model"),
        ("heads", positive, 4, "attention heads"),
        ("rate", above_zero, 2e-3, "peak learning rate of Adam"),
        ("dtype", ("float32", "bfloat16"), "float32", "dtype of the computation"),
        ("reports", positive, 10, "number of reports"),
        ("sample", positive, 400, "bytes to sample after training"),
        ("seed", natural, 0, "seed of the run"),
        ("plot", picture, None, "save pictures of the gradients"),
    )
    parser.add_argument(
        "--recompute", action="store_true", help="save only the input of each block"
    )
    parser.add_checkpoints("at every report")
    args = parser.parse()
    if args.features % args.heads:
        parser.error("--heads must divide --features")
    train(args)


if __name__ == "__main__":
    run(main)
