"""Train a Flax network on handwritten digits by DP-SGD, without a change to the network.

    python examples/flax_private.py
    python examples/flax_private.py --noise 2 --epochs 40

``jp.function(model.apply)`` is the layer of the model, and ``jp.clipped_grad`` clips each image's
gradient in one walk back. Images are drawn and epsilon is accounted for as in private_sgd.py.
"""

import argparse
import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from digits import load
from flax import linen as nn
from options import Parser, above_zero, natural, positive, run
from private_sgd import epsilon

import jaxprop as jp


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(16, (3, 3))(x.reshape(-1, 8, 8, 1)))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def train(args: argparse.Namespace) -> None:
    """Train the network, and print its coverage, epsilon, and the accuracy on held-out digits."""
    images, labels, test_x, test_y = load(args.seed)
    rate, steps = args.batch / len(labels), args.epochs * len(labels) // args.batch
    if rate > 1:
        sys.exit(f"--batch is at most the {len(labels)} images to train on")
    room = min(len(labels), args.batch + 10 * math.isqrt(args.batch) + 20)
    model = Cnn()
    net = jp.function(model.apply)
    private = functools.partial(
        jp.clipped_grad, max_norm=1.0, noise_multiplier=args.noise, drop_nonfinite=True
    )
    optimizer = optax.sgd(args.rate, momentum=0.9)
    update = jp.make_update(net, jp.CrossEntropy(), optimizer, value_and_grad=private)

    def step(carry: Any, key: Any) -> tuple[Any, Any]:
        for_draw, for_noise = jax.random.split(key)
        drawn = jax.random.bernoulli(for_draw, rate, labels.shape)
        (rows,) = jnp.nonzero(drawn, size=room, fill_value=-1)  # padded, with weight 0
        given = {"weights": rows >= 0, "divisor": args.batch, "key": for_noise}
        params, state = carry
        params, state, _ = update(params, state, images[rows], labels[rows], **given)
        return (params, state), drawn.sum()

    for_init, *keys = jax.random.split(jax.random.key(args.seed), steps + 1)
    params = model.init(for_init, images[:1])
    print(net.coverage(params, images[:room]))
    carry = params, update.init(params)
    (params, _), drawn = jax.jit(lambda *a: jax.lax.scan(step, *a))(carry, jnp.stack(keys))
    if drawn.max() > room:
        sys.exit(f"{drawn.max()} images were drawn for {room} places: epsilon would be wrong")
    accuracy = jnp.mean(net(params, test_x).argmax(axis=-1) == test_y)
    print(f"{steps} steps of {drawn.mean():.0f} images on average")
    print(f"epsilon {epsilon(args.noise, rate, steps, 1e-5):.2f} at delta 1e-05")
    print(f"accuracy {accuracy:.2%} on {len(test_y)} digits held out of training")


def main() -> None:
    parser = Parser("Train a Flax network on scikit-learn's digits privately.")
    parser.add(
        ("epochs", positive, 40, "number of epochs"),
        ("batch", positive, 128, "expected number of images per step"),
        ("rate", above_zero, 0.1, "learning rate of SGD with momentum 0.9"),
        ("noise", above_zero, 1.5, "noise multiplier"),
        ("seed", natural, 0, "seed of the run"),
    )
    train(parser.parse())


if __name__ == "__main__":
    run(main)
