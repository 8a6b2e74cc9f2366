"""Train a byte-level LSTM to write Python, on the source files of the standard library.

    python examples/lstm.py
    python examples/lstm.py --auto --steps 2000

The input is one-hot bytes, and the model predicts the next byte at every position. A tenth of the
files is held out, and the loss on windows of them is reported in bits per byte. The steps between
two reports are one ``lax.scan``.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from corpus import load, show
from options import Parser, above_zero, natural, positive, run
from scanning import make_steps

import jaxprop as jp

LOSS = jp.CrossEntropy()
SYMBOLS = 128
LENGTH = 64


def windows(key: Any, text: Any, batch: int) -> tuple[Any, Any]:
    """Return one-hot x (batch, LENGTH, SYMBOLS) and the bytes that follow, (batch, LENGTH)."""
    starts = jax.random.randint(key, (batch, 1), 0, len(text) - LENGTH)
    cut = text[starts + jnp.arange(LENGTH + 1)].astype(jnp.int32)
    return jax.nn.one_hot(cut[:, :-1], SYMBOLS), cut[:, 1:]


@functools.partial(jax.jit, static_argnames=("net", "length"))
def sample(net: Any, params: Any, key: Any, length: int) -> Any:
    """Return ``length`` bytes, each drawn at temperature 0.7 given the last LENGTH bytes."""

    def step(context: Any, key: Any) -> tuple[Any, Any]:
        logits, _ = net.forward(params, jax.nn.one_hot(context, SYMBOLS)[None])
        drawn = jax.random.categorical(key, logits[0, -1] / 0.7)
        return jnp.append(context[1:], drawn), drawn

    newlines = jnp.full(LENGTH, ord("\n"))
    return jax.lax.scan(step, newlines, jax.random.split(key, length))[1]


def main() -> None:
    parser = Parser("Train an LSTM to write Python.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--hand", action="store_true", help="differentiate by the hand-written chain (default)"
    )
    how.add_argument("--auto", action="store_true", help="differentiate by autodiff")
    parser.add(
        ("steps", positive, 1000, "training steps"),
        ("batch", positive, 32, "windows per step"),
        ("features", positive, 256, "width of the LSTM"),
        ("rate", above_zero, 4e-3, "initial learning rate of Adam"),
        ("seed", natural, 0, "seed of the run"),
    )
    args = parser.parse()

    train, held_out = map(jnp.asarray, load(args.seed))
    for_init, for_steps, for_test, for_sample = jax.random.split(jax.random.key(args.seed), 4)
    net = jp.chain(jp.Lstm(args.features), jp.Dense(SYMBOLS))
    schedule = optax.cosine_decay_schedule(args.rate, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    differentiate = jp.autodiff if args.auto else jp.value_and_grad
    update = jp.make_update(net, LOSS, optimizer, value_and_grad=differentiate)
    steps = make_steps(update, lambda key: windows(key, train, args.batch))

    test = windows(for_test, held_out, 256)
    bits = jax.jit(lambda params: jp.loss_fn(net, LOSS)(params, *test) / math.log(2))
    params = net.init(for_init, jax.eval_shape(lambda: test)[0])
    state = update.init(params)
    keys = jax.random.split(for_steps, args.steps)
    print(f"{len(train):,} bytes to train on, {len(held_out):,} held out", flush=True)
    each = math.ceil(args.steps / 10)
    for start in range(0, args.steps, each):
        params, state, value = steps(params, state, keys[start : start + each])
        done = min(start + each, args.steps)
        print(
            f"step {done:6d}  train {value / math.log(2):.3f}  "
            f"held out {bits(params):.3f} bits per byte",
            flush=True,
        )
    print("a sample:")
    print(show(sample(net, params, for_sample, 400)))


if __name__ == "__main__":
    run(main)
