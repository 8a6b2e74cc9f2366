"""Classify handwritten digits, given as spike trains, by spiking units and a surrogate gradient.

    python examples/spiking.py
    python examples/spiking.py --slope 10 --plot spikes.png

At each time step a pixel fires with a probability equal to its brightness. Two layers of leaky
integrate-and-fire units (``jp.rules.Lif``) pass spikes on; the score of a class is the mean over
time of the last dense layer's output. The step function of a unit has no useful derivative, so the
walk back uses that of a smooth step.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load
from options import Parser, above_zero, natural, picture, positive, run

import jaxprop as jp

LOSS, BATCH = jp.CrossEntropy(), 64


def make_net(args: argparse.Namespace) -> jp.Layer:
    """Return the network, for spikes (N, T, 64)."""
    lif = jp.rules.Lif(args.decay, slope=args.slope)
    return jp.chain(
        *(jp.Dense(args.features), lif, jp.Dense(args.features), lif),
        *(jp.Dense(10), jp.GlobalAvgPool()),
    )


def spikes(key: Any, images: Any, steps: int) -> Any:
    """Return spike trains (N, T, 64) of images (N, 64) of brightness from 0 to 1."""
    shape = len(images), steps, images.shape[1]
    return jax.random.bernoulli(key, images[:, None], shape).astype(images.dtype)


def train(net: jp.Layer, args: argparse.Namespace, data: Any) -> Any:
    """Train the net, print a line for every tenth of the epochs, and return its params."""
    images, labels, test_images, test_labels = data
    batches, key = len(labels) // BATCH, jax.random.key(args.seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(args.rate, args.epochs * batches))
    update = jp.make_update(net, LOSS, optimizer)
    params = net.init(key, jax.eval_shape(lambda: spikes(key, images[:1], args.steps)))

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: Any, number: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(jax.random.fold_in(key, number), len(labels))
        rows = order[: batches * BATCH].reshape(batches, BATCH)

        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            rows, number = given
            params, state = carry
            x = spikes(jax.random.fold_in(key, number), images[rows], args.steps)
            params, state, value = update(params, state, x, labels[rows])
            return (params, state), value

        numbers = batches * (1 + number) + jnp.arange(batches)
        carry, values = jax.lax.scan(step, carry, (rows, numbers))
        return carry, values.mean()

    held_out = spikes(jax.random.key(args.seed + 1), test_images, args.steps)
    right = jax.jit(lambda params: jnp.mean(net(params, held_out).argmax(-1) == test_labels))
    carry = params, update.init(params)
    for number in range(args.epochs):
        carry, value = epoch(carry, number)
        if (number + 1) % max(1, args.epochs // 10) == 0:
            accuracy = 100 * float(right(carry[0]))
            print(f"epoch {number + 1:3d}  loss {value:.4f}  held out {accuracy:.1f}%", flush=True)
    return carry[0]


def draw(net: Any, params: Any, image: Any, args: argparse.Namespace) -> None:
    """Draw the spikes of one image through the layers."""
    from matplotlib import pyplot as plt

    x = spikes(jax.random.key(args.seed), image[None], args.steps)
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.4))
    panels[0].imshow(np.reshape(image, (8, 8)), cmap="gray")
    panels[0].set(title="the image", xticks=[], yticks=[])
    trains, titles = [x], ["its spikes", "first layer", "second layer"]
    for layer, p in zip(net.layers[:4], params[:4], strict=True):
        x = layer(p, x)
        trains += [x] if isinstance(layer, jp.rules.Lif) else []
    for axes, train, title in zip(panels[1:], trains, titles, strict=True):
        axes.spy(np.asarray(train[0]).T, aspect="auto", markersize=2, color="C0")
        axes.xaxis.tick_bottom()
        rate = float(train.mean())
        axes.set(title=f"{title}: {100 * rate:.0f}% fire", xlabel="step", ylabel="unit")
    figure.tight_layout()
    figure.savefig(args.plot, dpi=110)


def main() -> None:
    parser = Parser("Spiking digits.")
    parser.add(
        ("epochs", positive, 30, "passes over the training images"),
        ("steps", positive, 20, "steps of a spike train"),
        ("features", positive, 128, "units of each layer"),
        ("decay", above_zero, 0.8, "part of a potential that is left"),
        ("slope", above_zero, 5.0, "slope of the smooth step"),
        ("rate", above_zero, 2e-3, "learning rate of Adam"),
        ("seed", natural, 0, "seed of the split, the params and the spikes"),
        ("plot", picture, None, "draw the spikes of an image into this file"),
    )
    args = parser.parse()
    net, data = make_net(args), load(args.seed)
    params = train(net, args, data)
    if args.plot is not None:
        draw(net, params, data[2][0], args)


if __name__ == "__main__":
    run(main)
