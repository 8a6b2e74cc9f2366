"""Train on digits without backpropagation through the layers, by two local rules.

    python examples/local_learning.py
    python examples/local_learning.py --rule ff --epochs 100

Forward-forward (Hinton 2022, https://arxiv.org/abs/2212.13345): each layer learns separately to
output a large sum of squares for an image joined to its right label, and a small one for an image
with a wrong label. Each layer normalizes its input, so that it cannot see how large the sum of the
layer before was. The predicted class is the label with the largest sums over all layers except the
first.

Difference target propagation (Lee et al. 2015, https://arxiv.org/abs/1412.7525): each layer has its
own target. A learned inverse maps the target of the layer above back to it. The target of the last
layer is one gradient step of the loss away.

Both are limiting cases of what a layer's forward and backward are for: a chain of one layer, with
its own loss.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from digits import load
from options import Parser, above_zero, natural, positive, run

import jaxprop as jp

BATCH, CLASSES = 64, 10
SQUARES, ENTROPY = jp.HalfSquaredError(), jp.CrossEntropy()


class Method(NamedTuple):
    """A way to learn.

    Attributes:
        start: ``start(key) -> state``.
        step: ``step(state, images, labels, key) -> (state, value)``.
        classes: ``classes(state, images) -> labels``.
    """

    start: Callable[..., Any]
    step: Callable[..., Any]
    classes: Callable[..., Any]


@jp.loss
def goodness(y: Any, sign: Any) -> Any:
    """Return log(1 + exp(-s)), s = sign 4 (mean of y^2 - 1): small on the right side of 1."""
    return jax.nn.softplus(-4 * sign * (jnp.mean(y**2) - 1))


def labelled(images: Any, labels: Any) -> Any:
    """Return images with their label appended, as one nonzero entry of ten."""
    return jnp.concatenate([images, 2.0 * jax.nn.one_hot(labels, CLASSES)], -1)


def forward_forward(args: argparse.Namespace, pixels: int) -> Method:
    """Return forward-forward for images with the given number of pixels."""
    blocks = [
        jp.chain(jp.RMSNorm(), jp.Dense(args.features), jp.Relu()) for _ in range(args.layers)
    ]
    update = [jp.make_update(block, goodness, optax.adam(args.rate)) for block in blocks]

    def start(key: Any) -> Any:
        sizes = [pixels + CLASSES, *[args.features] * args.layers]
        keys = jax.random.split(key, args.layers)
        params = [
            b.init(k, jnp.zeros((1, n))) for b, k, n in zip(blocks, keys, sizes, strict=False)
        ]
        return [(p, u.init(p)) for p, u in zip(params, update, strict=True)]

    def step(state: Any, images: Any, labels: Any, key: Any) -> tuple[Any, Any]:
        wrong = (labels + jax.random.randint(key, labels.shape, 1, CLASSES)) % CLASSES
        x = jnp.concatenate([labelled(images, labels), labelled(images, wrong)])
        signs = jnp.repeat(jnp.array([1.0, -1.0]), len(images))
        after, values = [], []
        for block, u, (params, of_optimizer) in zip(blocks, update, state, strict=True):
            y = block(params, x)
            params, of_optimizer, value = u(params, of_optimizer, x, signs)
            x, after = y, [*after, (params, of_optimizer)]
            values.append(value)
        return after, sum(values) / len(values)

    def classes(state: Any, images: Any) -> Any:
        def squares(label: Any) -> Any:
            x, each = labelled(images, jnp.full(len(images), label)), []
            for block, (params, _) in zip(blocks, state, strict=True):
                x = block(params, x)
                each.append(jnp.mean(x**2, -1))
            return sum(each[1:] or each)

        return jax.vmap(squares)(jnp.arange(CLASSES)).argmax(0)

    return Method(start, step, classes)


def target_propagation(args: argparse.Namespace, pixels: int) -> Method:
    """Return difference target propagation for images with the given number of pixels."""
    widths = [pixels, *[args.features] * args.layers]
    layers = [jp.chain(jp.Dense(width), jp.Tanh()) for width in widths[1:]]
    inverses = [jp.chain(jp.Dense(width), jp.Tanh()) for width in widths[1:-1]]
    head = jp.Dense(CLASSES)
    ahead, back = (
        [jp.make_update(f, SQUARES, optax.adam(args.rate)) for f in each]
        for each in (layers, inverses)
    )
    last = jp.make_update(head, ENTROPY, optax.adam(args.rate))

    def start(key: Any) -> Any:
        keys = iter(jax.random.split(key, 2 * len(widths)))

        def of(net: jp.Layer, update: Any, width: int) -> Any:
            params = net.init(next(keys), jnp.zeros((1, width)))
            return params, update.init(params)

        return (
            list(map(of, layers, ahead, widths)),
            list(map(of, inverses, back, widths[2:])),
            of(head, last, widths[-1]),
        )

    def step(state: Any, images: Any, labels: Any, key: Any) -> tuple[Any, Any]:
        fs, gs, (w, of_head) = state
        hs = [images]
        for f, (params, _) in zip(layers, fs, strict=True):
            hs.append(f(params, hs[-1]))
        y, saved = head.forward(w, hs[-1])
        _, of_loss = ENTROPY.forward(y, labels)
        target = hs[-1] - args.nudge * head.backward(w, saved, ENTROPY.backward(of_loss))[1]
        w, of_head, value = last(w, of_head, hs[-1], labels)
        new_fs, new_gs = list(fs), list(gs)
        for i in reversed(range(len(layers))):
            params, s = fs[i]
            new_fs[i] = ahead[i](params, s, hs[i], target)[:2]
            if i:  # the difference: the inverse of the target, less the inverse's own error
                g, (params, s) = inverses[i - 1], gs[i - 1]
                target = hs[i] + g(params, target) - g(params, hs[i + 1])
                noisy = hs[i] + 0.1 * jax.random.normal(jax.random.fold_in(key, i), hs[i].shape)
                new_gs[i - 1] = back[i - 1](params, s, layers[i](fs[i][0], noisy), noisy)[:2]
        return (new_fs, new_gs, (w, of_head)), value

    def classes(state: Any, images: Any) -> Any:
        fs, _, (w, _) = state
        for f, (params, _) in zip(layers, fs, strict=True):
            images = f(params, images)
        return head(w, images).argmax(-1)

    return Method(start, step, classes)


METHODS = {
    "ff": ("forward-forward", forward_forward),
    "dtp": ("difference target propagation", target_propagation),
}


def train(method: Method, args: argparse.Namespace, data: Any) -> None:
    """Train, and print a line for every tenth of the epochs."""
    images, labels, test_images, test_labels = data
    batches, key = len(labels) // BATCH, jax.random.key(args.seed)

    @jax.jit
    def epoch(state: Any, key: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(key, len(labels))[: batches * BATCH]

        def step(state: Any, given: Any) -> tuple[Any, Any]:
            rows, key = given
            return method.step(state, images[rows], labels[rows], key)

        keys = jax.random.split(key, batches)
        state, values = jax.lax.scan(step, state, (order.reshape(batches, BATCH), keys))
        return state, values.mean()

    right = jax.jit(lambda state: jnp.mean(method.classes(state, test_images) == test_labels))
    state = method.start(key)
    for number in range(1, args.epochs + 1):
        state, value = epoch(state, jax.random.fold_in(key, number))
        if number % max(1, args.epochs // 10) == 0:
            accuracy = 100 * float(right(state))
            print(f"epoch {number:3d}  loss {value:.4f}  held out {accuracy:.1f}%", flush=True)


def main() -> None:
    parser = Parser("Learning without a backward pass through the layers.")
    parser.add(
        ("rule", ("both", *METHODS), "both", "which rule"),
        ("epochs", positive, 50, "passes over the training images"),
        ("layers", positive, 3, "hidden layers"),
        ("features", positive, 256, "units of each"),
        ("rate", above_zero, 1e-3, "learning rate of Adam"),
        ("nudge", above_zero, 1.0, "step of the last target down the loss"),
        ("seed", natural, 0, "seed of the split and the params"),
    )
    args = parser.parse()
    data = load(args.seed)
    for rule, (name, make) in METHODS.items():
        if args.rule in ("both", rule):
            print(name)
            train(make(args, data[0].shape[1]), args, data)


if __name__ == "__main__":
    run(main)
