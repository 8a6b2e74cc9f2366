"""Train on digits by five learning rules, and see how far each one's steps are from the gradient.

    python examples/learning_rules.py --plot rules.png

The rules are backpropagation, sign-symmetric feedback, Kolen-Pollack, feedback alignment and
direct feedback alignment (``jp.rules``), for a dense network and a small convolution network. All
start from the same params and have the same batches, epochs, momentum and weight decay, for several
seeds. The learning rate of each is the one of four that ends with the lowest training loss. The
angle is that between a layer's gradient by the rule and the derivative, on the first training
images; at 90 degrees the rule says nothing about the derivative.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load
from options import Parser, natural, picture, positive, run

import jaxprop as jp

LOSS = jp.CrossEntropy()
RATES = (0.003, 0.01, 0.03, 0.1)
DECAY, MOMENTUM, BATCH, SEEN = 1e-3, 0.9, 32, 256
NETS: dict[str, jp.Layer] = {
    "mlp": jp.chain(
        *(jp.Dense(128), jp.Relu(), jp.Dense(128), jp.Relu(), jp.Dense(64), jp.Relu()),
        jp.Dense(10),
    ),
    "cnn": jp.chain(
        jp.Reshape((8, 8, 1)),
        *(jp.Conv(16, (3, 3), padding="SAME"), jp.Relu(), jp.AvgPool((2, 2))),
        *(jp.Conv(32, (3, 3), padding="SAME"), jp.Relu(), jp.Flatten()),
        *(jp.Dense(64), jp.Relu(), jp.Dense(10)),
    ),
}
RULES: dict[str, Callable[[jp.Layer], jp.Layer]] = {
    "backpropagation": lambda net: net,
    "sign-symmetric": jp.rules.sign_symmetric,
    "Kolen-Pollack": jp.rules.kolen_pollack,
    "feedback alignment": jp.rules.feedback_alignment,
    "direct feedback": jp.rules.direct_feedback_alignment,
}


class Course(NamedTuple):
    """The results of runs after each epoch, (seeds, epochs, ...).

    Attributes:
        loss: the mean training loss of the epoch.
        accuracy: the share of the held-out images that are classified correctly.
        angles: the angle at each layer with weights, in degrees.
    """

    loss: Any
    accuracy: Any
    angles: Any


def weights(net: jp.Layer, tree: Any) -> list[Any]:
    """Return the entries of a tree like params at the layers' weights."""
    layers = tree.params if hasattr(tree, "feedback") else tree
    own = [getattr(layer, "params", layer) for layer in layers]
    return [layer.w for layer in own if hasattr(layer, "w")]


@functools.partial(jax.jit, static_argnames=("net", "epochs"))
def train(net: jp.Layer, epochs: int, data: Any, rates: Any, seeds: Any) -> Course:
    """Train the net at each rate from every seed, and return the results of all runs.

    Each field of the result has a leading axis of rates.
    """
    images, labels, test_images, test_labels = data
    angles = jp.rules.angles(net, LOSS)
    steps = len(labels) // BATCH

    def one(rate: Any, seed: Any) -> Course:
        optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, MOMENTUM))
        update = jp.make_update(net, LOSS, optimizer)
        key = jax.random.key(seed)
        params = net.init(key, images[:1])

        def epoch(carry: Any, number: Any) -> tuple[Any, Course]:
            order = jax.random.permutation(jax.random.fold_in(key, number), len(labels))
            rows = order[: steps * BATCH].reshape(steps, BATCH)

            def step(carry: Any, rows: Any) -> tuple[Any, Any]:
                params, state = carry
                params, state, value = update(params, state, images[rows], labels[rows])
                return (params, state), value

            (params, state), values = jax.lax.scan(step, carry, rows)
            right = jnp.mean(net(params, test_images).argmax(-1) == test_labels)
            seen = weights(net, angles(params, images[:SEEN], labels[:SEEN]))
            return (params, state), Course(values.mean(), right, jnp.stack(seen))

        return jax.lax.scan(epoch, (params, update.init(params)), jnp.arange(epochs))[1]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, seeds)


def best_of(net: jp.Layer, args: argparse.Namespace, data: Any) -> tuple[float, Course]:
    """Return the rate whose training loss ends lowest, over all seeds, and its course."""
    rates, seeds = jnp.array(RATES), args.seed + jnp.arange(args.seeds)
    courses = jax.tree.map(np.asarray, train(net, args.epochs, data, rates, seeds))
    losses = courses.loss[:, :, -1].mean(1)
    best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    return RATES[best], jax.tree.map(lambda values: values[best], courses)


def draw(courses: dict[str, dict[str, Course]], path: str) -> None:
    """Draw the accuracy and the angles of every net and rule over the epochs."""
    from matplotlib import pyplot as plt

    most = max(c.angles.shape[-1] for rules in courses.values() for c in rules.values())
    size = 3.2 * most, 3.0 * len(courses)
    figure, rows = plt.subplots(len(courses), most, figsize=size, squeeze=False, sharex=True)
    for row, (name, by_rule) in zip(rows, courses.items(), strict=True):
        for number, (rule, course) in enumerate(by_rule.items()):
            epochs = np.arange(1, course.loss.shape[1] + 1)
            panels = [100 * course.accuracy, *np.moveaxis(course.angles, -1, 0)[:-1]]
            for axes, values in zip(row, panels, strict=False):
                axes.plot(epochs, values.mean(0), color=f"C{number}", label=rule)
                axes.fill_between(
                    epochs, values.min(0), values.max(0), color=f"C{number}", alpha=0.2
                )
        row[0].set(title=f"{name}: held-out accuracy, %", ylim=(60, 100))
        for number, axes in enumerate(row[1:], 1):
            axes.set(title=f"angle at layer {number}, degrees", ylim=(-3, 125))
        for axes in row:
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            axes.set_visible(bool(axes.lines))
    rows[0, 0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser("Learning rules on handwritten digits.")
    parser.add(
        ("net", ("both", *NETS), "both", "which network"),
        ("epochs", positive, 30, "passes over the training images"),
        ("seeds", positive, 5, "runs of each rule"),
        ("seed", natural, 0, "first seed"),
        ("plot", picture, None, "draw the courses into this file"),
    )
    args = parser.parse()
    data, courses = load(args.seed), {}
    for name, net in NETS.items():
        if args.net not in ("both", name):
            continue
        courses[name] = {}
        print(
            f"{name:20} {'rate':>6} {'error':>6}  {'of the seeds':>13}  angles, first to last layer"
        )
        for rule, make in RULES.items():
            rate, course = best_of(make(net), args, data)
            courses[name][rule] = course
            errors = 100 * (1 - course.accuracy[:, -1])
            angles = " ".join(f"{angle:3.0f}" for angle in course.angles[:, -1].mean(0))
            spread = f"{errors.min():.1f} to {errors.max():.1f}"
            print(f"{rule:20} {rate:6g} {errors.mean():5.1f}%  {spread:>13}  {angles}", flush=True)
    if args.plot is not None:
        draw(courses, args.plot)


if __name__ == "__main__":
    run(main)
