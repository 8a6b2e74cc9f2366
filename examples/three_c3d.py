"""Train 3C3D or All-CNN-C on 32 x 32 images, by the hand-written chain or by autodiff.

    python examples/three_c3d.py
    python examples/three_c3d.py --model all-cnn-c --epochs 2
    python examples/three_c3d.py --grad auto

After each epoch the script prints the 10 % and 90 % quantiles of the per-example gradient norms of
one batch. They cost about as much as the gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from images import LOSS, Observe, make_parser, parse, train
from options import run

import jaxprop as jp

NETS = {"3c3d": jp.models.three_c3d, "all-cnn-c": jp.models.all_cnn_c}


def gradient_norms(net: jp.Layer, examples: int) -> Observe:
    """Return a function that reports the gradient norms of the first ``examples`` images."""
    sq_norms = jax.jit(jp.per_example_sq_norms(net, LOSS))

    def observe(params: Any, x: Any, target: Any) -> str:
        norms = jnp.sqrt(sq_norms(params, x[:examples], target[:examples]))
        low, high = jnp.quantile(norms, jnp.array([0.1, 0.9]))
        return f"gradient norms {low:.3f} to {high:.3f}"

    return observe


def main() -> None:
    parser = make_parser("Train a convolutional network on digits.")
    parser.add(("model", NETS, "3c3d", "the network"))
    args = parse(parser)
    net = NETS[args.model](classes=10)
    train(net, args, gradient_norms(net, args.batch))


if __name__ == "__main__":
    run(main)
