"""Coloured images that need no download, and the training loop of the scripts that classify them.

The images are the 1,797 digits of scikit-learn, enlarged to 32 x 32. Each has a random colour on a
background of noise, both drawn from the seed. A fifth is held out.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from options import Parser, above_zero, natural, positive
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprop as jp

LOSS = jp.CrossEntropy()
DIFFERENTIATE = {"hand": jp.value_and_grad, "auto": jp.autodiff}
ALL = 1797
Observe = Callable[[Any, Any, Any], str]


def load(seed: int, examples: int = ALL) -> tuple[Any, ...]:
    """Return train images, test images, train labels and test labels.

    Images are (N, 32, 32, 3), float32, with mean 0 and standard deviation 1 over the whole set.
    """
    digits: Any = load_digits()
    small, labels = digits.images[:examples] / 16, digits.target[:examples]
    rng = np.random.default_rng(seed)
    large = jax.image.resize(small, (len(labels), 32, 32), "linear")
    colours = rng.uniform(0.5, 1.0, size=(len(large), 1, 1, 3))
    images = np.asarray(large)[..., None] * colours + 0.1 * rng.normal(size=(*large.shape, 3))
    split = train_test_split(
        (images - images.mean()) / images.std(),
        labels,
        test_size=0.2,
        random_state=seed,
        stratify=labels,
    )
    return (
        *(jnp.asarray(x, jnp.float32) for x in split[:2]),
        *(jnp.asarray(y, jnp.int32) for y in split[2:]),
    )


def train(net: jp.Layer, args: argparse.Namespace, observe: Observe) -> float:
    """Train with Adam, print a line per epoch, and return the accuracy on the held-out images.

    The time per step of the first epoch includes compilation.

    Args:
        net: the network.
        args: the options of ``make_parser``.
        observe: called with the params, all training images and their labels after each epoch; the
            string that it returns ends the line.
    """
    train_x, test_x, train_y, test_y = load(args.seed, args.examples)
    optimizer = optax.adam(args.rate)
    update = jp.make_update(net, LOSS, optimizer, value_and_grad=DIFFERENTIATE[args.grad])
    predict = jax.jit(lambda params, x: net.forward(params, x)[0].argmax(axis=-1))
    params = net.init(jax.random.key(args.seed), train_x[:1])
    state = update.init(params)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} params", flush=True)

    rng = np.random.default_rng(args.seed)
    for epoch in range(1, args.epochs + 1):
        order = rng.permutation(len(train_y))
        start, losses = time.perf_counter(), []
        for first in range(0, len(order) - args.batch + 1, args.batch):
            rows = order[first : first + args.batch]
            params, state, loss = update(params, state, train_x[rows], train_y[rows])
            losses.append(loss)
        loss = float(jnp.stack(losses).mean())
        step = 1e3 * (time.perf_counter() - start) / len(losses)
        print(
            f"epoch {epoch:2d}  loss {loss:.4f}  {step:.0f} ms a step"
            f"  {observe(params, train_x, train_y)}",
            flush=True,
        )
    held_out = float(jnp.mean(predict(params, test_x) == test_y))
    print(f"accuracy {held_out:.2%} on {len(test_y)} images held out of training")
    return held_out


def make_parser(description: str) -> Parser:
    """Return a parser of the options that ``train`` reads; a script adds its own."""
    parser = Parser(description)
    parser.add(
        ("grad", DIFFERENTIATE, "hand", "the hand-written chain or autodiff"),
        ("epochs", positive, 6, "number of epochs"),
        ("batch", positive, 64, "images per step"),
        ("rate", above_zero, 1e-3, "learning rate of Adam"),
        ("seed", natural, 0, "seed of the run"),
        ("examples", positive, ALL, "images, held-out ones included"),
    )
    return parser


def parse(parser: Parser) -> argparse.Namespace:
    """Parse the command line, and check the options that ``train`` reads."""
    args = parser.parse()
    if not 50 <= args.examples <= ALL:
        parser.error(f"--examples is from 50 to {ALL}")
    if args.batch > 4 * args.examples // 5:
        parser.error("--batch is at most four fifths of --examples")
    return args
