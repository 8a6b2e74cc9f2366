"""3C3D or All-CNN-C on images of 32 x 32: convolutions, by the hand-written chain or by autodiff.

    python examples/three_c3d.py
    python examples/three_c3d.py --model all-cnn-c --epochs 2
    python examples/three_c3d.py --grad auto

CIFAR is not fetched. The images are scikit-learn's 1,797 digits, enlarged to 32 x 32, each in a
colour drawn from the seed on a background of noise; a fifth is held out. After each epoch the norms
of some examples' own gradients are printed, which the same walk gives at the price of the gradient.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxprop as jp

LOSS = jp.CrossEntropy()
NETS = {"3c3d": jp.models.three_c3d, "all-cnn-c": jp.models.all_cnn_c}
DIFFERENTIATE = {
    "hand": jp.value_and_grad,
    "auto": lambda net, loss: jax.value_and_grad(jp.loss_fn(net, loss)),
}


def load(seed: int) -> tuple[Any, ...]:
    """Train images, test images (N, 32, 32, 3), train labels, test labels."""
    digits: Any = load_digits()
    rng = np.random.default_rng(seed)
    large = jax.image.resize(digits.images / 16, (len(digits.target), 32, 32), "linear")
    colours = rng.uniform(0.5, 1.0, size=(len(large), 1, 1, 3))
    images = np.asarray(large)[..., None] * colours + 0.1 * rng.normal(size=(*large.shape, 3))
    split = train_test_split(
        (images - images.mean()) / images.std(),
        digits.target,
        test_size=0.2,
        random_state=seed,
        stratify=digits.target,
    )
    return (
        *(jnp.asarray(x, jnp.float32) for x in split[:2]),
        *(jnp.asarray(y, jnp.int32) for y in split[2:]),
    )


def train(args: argparse.Namespace) -> float:
    train_x, test_x, train_y, test_y = load(args.seed)
    net = NETS[args.model](classes=10)
    optimizer = optax.adam(args.rate)
    update = jp.make_update(net, LOSS, optimizer, value_and_grad=DIFFERENTIATE[args.grad])
    sq_norms = jax.jit(jp.per_example_sq_norms(net, LOSS))
    predict = jax.jit(lambda params, x: net.forward(params, x)[0].argmax(axis=-1))
    params = net.init(jax.random.key(args.seed), train_x[:1])
    state = optimizer.init(params)
    some = train_x[: args.batch], train_y[: args.batch]

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
        low, high = jnp.quantile(jnp.sqrt(sq_norms(params, *some)), jnp.array([0.1, 0.9]))
        print(
            f"epoch {epoch:2d}  loss {loss:.4f}  {step:.0f} ms a step"
            f"  gradient norms {low:.3f} to {high:.3f}",
            flush=True,
        )
    held_out = float(jnp.mean(predict(params, test_x) == test_y))
    print(f"accuracy {held_out:.2%} on {len(test_y)} images held out of training")
    return held_out


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a convolutional network on digits.")
    parser.add_argument("--model", choices=NETS, default="3c3d")
    parser.add_argument(
        "--grad", choices=DIFFERENTIATE, default="hand", help="how to differentiate"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
