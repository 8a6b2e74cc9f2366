"""Ask a small convolution network which pixels of a digit speak for its class, in eight ways.

    python examples/attribution.py --plot attribution.png

Each method is a backward rule (``jp.rules``) for the same trained params, or a mean of gradients.
For the chosen digit, the script prints the score, and the table has the sum of each method's pixel
attributions, which explain it. For the held-out digits, the table has the percentage of the score
that is left when the pixels that a method ranks first are made black. The last row picks as many
pixels at random, of those that are not black.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load
from options import Parser, natural, picture, positive, run

import jaxprop as jp

LOSS, BATCH = jp.CrossEntropy(), 32
NET = jp.chain(
    *(jp.Conv(32, (3, 3), padding="SAME"), jp.Relu(), jp.Conv(32, (3, 3)), jp.Relu()),
    *(jp.AvgPool((2, 2)), jp.Flatten(), jp.Dense(128), jp.Relu(), jp.Dense(10)),
)
BOXED: Any = {(0,): jp.rules.lrp_z_box, jp.Conv: jp.rules.lrp_gamma}
METHODS = {
    "gradient": jp.rules.saliency(NET),
    "gradient x input": jp.rules.gradient_times_input(NET),
    "integrated gradients": jp.rules.integrated_gradients(NET, steps=64),
    "SmoothGrad": jp.rules.smooth_grad(NET, deviation=0.15, samples=64),
    "guided backpropagation": jp.rules.saliency(jp.rules.guided_backprop(NET)),
    "deconvolution": jp.rules.saliency(jp.rules.deconvolution(NET)),
    "LRP epsilon": jp.rules.relevance(jp.rules.lrp(NET)),
    "LRP z-box, gamma": jp.rules.relevance(jp.rules.lrp(NET, BOXED)),
}


def train(args: argparse.Namespace, images: Any, labels: Any) -> Any:
    """Return the params of the net after ``args.epochs`` epochs of Adam."""
    batches, key = len(labels) // BATCH, jax.random.key(args.seed)
    update = jp.make_update(NET, LOSS, optax.adam(1e-3))
    params = NET.init(key, images[:1])

    def epoch(carry: Any, key: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(key, len(labels))[: batches * BATCH]

        def step(carry: Any, rows: Any) -> tuple[Any, Any]:
            params, state = carry
            params, state, value = update(params, state, images[rows], labels[rows])
            return (params, state), value

        return jax.lax.scan(step, carry, order.reshape(batches, BATCH))

    keys = jax.random.split(key, args.epochs)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(epoch, carry, keys))(
        (params, update.init(params))
    )
    return params


def scores(params: Any, images: Any, classes: Any) -> Any:
    """Return the score of a class for each image, before the softmax."""
    return NET(params, images)[jnp.arange(len(images)), classes]


@functools.partial(jax.jit, static_argnames="removed")
def left(params: Any, images: Any, classes: Any, rank: Any, removed: int) -> Any:
    """Return the share of the scores left when the pixels of the highest rank are made black."""
    rank = jnp.where(images > 0, rank, -jnp.inf).reshape(len(images), -1)
    first = jnp.argsort(-rank, axis=1)[:, :removed]
    pixels = images.reshape(rank.shape).at[jnp.arange(len(rank))[:, None], first].set(0)
    now = scores(params, pixels.reshape(images.shape), classes)
    return now.sum() / scores(params, images, classes).sum()


def draw(image: Any, shares: dict[str, Any], title: str, path: Any) -> None:
    """Draw an image and its attribution by each method."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(3, 3, figsize=(8, 8.6))
    panels[0, 0].imshow(image[..., 0], cmap="gray_r")
    panels[0, 0].set_title(title)
    for axes, (name, share) in zip(panels.flat[1:], shares.items(), strict=True):
        most = float(np.abs(share).max())
        axes.imshow(share[..., 0], cmap="seismic", vmin=-most, vmax=most)
        axes.set_title(name)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser("Attribution on handwritten digits.")
    parser.add(
        ("epochs", positive, 20, "passes over the training images"),
        ("digit", natural, 0, "which of the held-out images is drawn"),
        ("removed", positive, 8, "how many pixels are made black"),
        ("seed", natural, 0, "seed of the split, the params and the noise"),
        ("plot", picture, None, "draw the attributions of a digit into this file"),
    )
    args = parser.parse()
    train_x, train_y, test_x, test_y = load(args.seed)
    if args.removed > test_x.shape[1]:
        parser.error(f"--removed: an image has {test_x.shape[1]} pixels")
    if args.digit >= len(test_x):
        parser.error(f"--digit: there are {len(test_x)} held-out images")
    train_x, test_x = (x.reshape(-1, 8, 8, 1) for x in (train_x, test_x))
    params = train(args, train_x, train_y)
    classes = NET(params, test_x).argmax(-1)
    print(f"held out {100 * jnp.mean(classes == test_y):.1f}% right")
    key = jax.random.key(args.seed)
    score = float(scores(params, test_x, classes)[args.digit])
    print(f"digit {args.digit}: a {test_y[args.digit]}, taken for a {classes[args.digit]}, by a "
          f"score of {score:.2f}\n")  # fmt: skip
    print(f"{'method':24} {'sum':>8}   score left without {args.removed} pixels")
    shares: dict[str, Any] = {}
    for name, method in METHODS.items():
        each = jax.jit(method)(params, test_x, classes, key=key)
        shares[name] = np.asarray(each[args.digit])
        part = left(params, test_x, classes, each, args.removed)
        print(f"{name:24} {shares[name].sum():8.2f}   {100 * part:4.0f}%", flush=True)
    chance = left(params, test_x, classes, jax.random.uniform(key, test_x.shape), args.removed)
    print(f"{'at random':24} {'':8}   {100 * chance:4.0f}%")
    if args.plot is not None:
        title = f"a {test_y[args.digit]}, score {score:.1f}"
        draw(np.asarray(test_x[args.digit]), shares, title, args.plot)


if __name__ == "__main__":
    run(main)
