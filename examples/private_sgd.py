"""Train an MLP on handwritten digits by DP-SGD, clipping all per-example gradients in one walk.

    python examples/private_sgd.py
    python examples/private_sgd.py --noise 2 --epochs 60

Each step draws every training image with the same small probability. This is the Poisson sampling
that the privacy accountant assumes. The size of a draw varies, but a jitted step needs a fixed one,
so the batch is padded with images of weight zero, and the sum divided by the expected size.
Google's dp-accounting computes epsilon, for adding or removing one image, from the noise
multiplier, the sampling rate and the number of steps.
"""

import argparse
import functools
import math
import sys
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import optax
from digits import load
from dp_accounting.pld import PLDAccountant
from options import Parser, above_zero, natural, positive, run

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(64), jp.Tanh(), jp.Dense(10))
OPTIONS = (
    ("epochs", positive, 40, "number of epochs"),
    ("batch", positive, 128, "expected number of images per step"),
    ("rate", above_zero, 0.1, "learning rate of SGD with momentum 0.9"),
    ("max-norm", above_zero, 1.0, "bound of a per-example gradient's norm"),
    ("noise", above_zero, 1.5, "noise multiplier"),
    ("delta", above_zero, 1e-5, "delta of differential privacy"),
    ("seed", natural, 0, "seed of the run"),
)


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon at delta after this many steps of DP-SGD."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return PLDAccountant().compose(step, steps).get_epsilon(delta)


def train(net: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Train a net on rows of 64 pixels, and return epsilon and the accuracy on held-out digits."""
    train_x, train_y, test_x, test_y = load(args.seed)
    count = len(train_y)
    rate, steps = args.batch / count, args.epochs * count // args.batch
    if rate > 1 or args.delta >= 1:
        sys.exit(f"--batch is at most the {count} images to train on, and --delta below 1")
    room = min(count, args.batch + 10 * math.isqrt(args.batch) + 20)  # ten standard deviations
    private = functools.partial(
        jp.clipped_grad, max_norm=args.max_norm, noise_multiplier=args.noise, drop_nonfinite=True
    )
    update = jp.make_update(
        net, LOSS, optax.sgd(args.rate, momentum=0.9), value_and_grad=private, aux=True
    )

    def step(carry: Any, key: Any) -> tuple[Any, Any]:
        for_draw, for_noise = jax.random.split(key)
        drawn = jax.random.bernoulli(for_draw, rate, (count,))
        (rows,) = jnp.nonzero(drawn, size=room, fill_value=-1)
        batch = train_x[rows], train_y[rows]
        given = {"key": for_noise, "weights": rows >= 0, "divisor": args.batch}
        params, state = carry
        params, state, (_, aux) = update(params, state, *batch, **given)
        return (params, state), (drawn.sum(), aux.clipped)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params: Any, key: Any, steps: int) -> tuple[Any, Any]:
        carry = params, update.init(params)
        (params, _), seen = jax.lax.scan(step, carry, jax.random.split(key, steps))
        return params, seen

    for_init, for_run = jax.random.split(jax.random.key(args.seed))
    params, (drawn, clipped) = run(net.init(for_init, train_x[:1]), for_run, steps)
    if drawn.max() > room:
        sys.exit(f"{drawn.max()} images were drawn for {room} places: epsilon would be wrong")
    accuracy = float(jnp.mean(net(params, test_x).argmax(axis=-1) == test_y))
    spent = epsilon(args.noise, rate, steps, args.delta)
    print(
        f"{steps} steps of {drawn.mean():.0f} images on average, {clipped.mean():.0%} of them "
        "clipped"
    )
    print(f"epsilon {spent:.2f} at delta {args.delta:g}")
    print(f"accuracy {accuracy:.2%} on {len(test_y)} digits held out of training")
    return spent, accuracy


def main() -> None:
    parser = Parser("Train an MLP on scikit-learn's digits privately.")
    parser.add(*OPTIONS)
    train(NET, parser.parse())


if __name__ == "__main__":
    run(main)
