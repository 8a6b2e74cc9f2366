"""Train an MLP on handwritten digits, by the hand-written chain or by autodiff.

    python examples/digits.py
    python examples/digits.py --grad auto --plot loss.png
    python examples/digits.py --checkpoints runs/digits            (interrupt it at any time, then)
    python examples/digits.py --checkpoints runs/digits --resume

The data are the 1,797 images of 8 x 8 pixels that ship with scikit-learn. Each epoch is one
``lax.scan`` over the minibatches. The full state is saved after every epoch, and the shuffle of an
epoch depends only on the seed and the epoch. A run that is killed and resumed is therefore bitwise
identical to an uninterrupted one.
"""

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from checkpoints import Checkpoints
from options import Parser, above_zero, natural, picture, positive, run
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from watching import Watch, draw, gradients

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(256), jp.Gelu(), jp.Dense(128), jp.Gelu(), jp.Dense(10))
WATCHED = 512  # number of digits whose gradients the progress line reports
DIFFERENTIATE = {"hand": jp.value_and_grad, "auto": jp.autodiff}


def load(seed: int) -> tuple[Any, ...]:
    """Return train images, train labels, test images and test labels; a fifth is held out.

    Images are rows (N, 64) of float32, scaled to [0, 1].
    """
    digits: Any = load_digits()
    images, labels = digits.data / 16, digits.target
    split = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = split
    return (
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y, jnp.int32),
        jnp.asarray(test_x, jnp.float32),
        jnp.asarray(test_y, jnp.int32),
    )


def make_epoch(update: Any, images: Any, labels: Any, batch: int) -> Any:
    """Return a jitted ``epoch(params, state, key) -> (params, state, mean loss)``, one scan."""
    steps = len(labels) // batch

    @functools.partial(jax.jit, donate_argnames=("params", "state"))
    def epoch(params: Any, state: Any, key: Any) -> tuple[Any, Any, Any]:
        order = jax.random.permutation(key, len(labels))[: steps * batch].reshape(steps, batch)

        def step(carry: Any, rows: Any) -> tuple[Any, Any]:
            params, state, value = update(*carry, images[rows], labels[rows])
            return (params, state), value

        (params, state), values = jax.lax.scan(step, (params, state), order)
        return params, state, values.mean()

    return epoch


@jax.jit
def accuracy(params: Any, images: Any, labels: Any) -> Any:
    """Return the fraction of images that are classified correctly."""
    logits, _ = NET.forward(params, images)
    return jnp.mean(logits.argmax(axis=-1) == labels)


def train(args: argparse.Namespace) -> float:
    """Train the MLP, print each epoch's loss, and return the accuracy on held-out digits."""
    train_x, train_y, test_x, test_y = load(args.seed)
    if args.batch > len(train_y):
        sys.exit(f"--batch {args.batch} is more than the {len(train_y)} digits to train on")
    steps = args.epochs * (len(train_y) // args.batch)
    optimizer = optax.sgd(optax.cosine_decay_schedule(args.rate, steps), momentum=0.9)
    update = jp.make_update(NET, LOSS, optimizer, value_and_grad=DIFFERENTIATE[args.grad])
    epoch = make_epoch(update, train_x, train_y, args.batch)

    for_init, for_order = jax.random.split(jax.random.key(args.seed))
    params = NET.init(for_init, train_x[:1])
    run = {
        "params": params,
        "state": update.init(params),
        "done": jnp.zeros((), jnp.int32),
        "losses": jnp.zeros(args.epochs, jnp.float32),
    }
    checkpoints = None
    if args.checkpoints is not None:
        names = ("grad", "epochs", "batch", "rate", "seed")
        settings = {name: getattr(args, name) for name in names}
        checkpoints = Checkpoints(args.checkpoints, settings, args.resume)
        run = checkpoints.restore(run)
        if run["done"]:
            print(f"resumed after epoch {run['done']}", flush=True)

    seen, first = [], int(run["done"])
    measure = gradients(NET, LOSS, train_x[:WATCHED], train_y[:WATCHED])
    with Watch("epoch", args.epochs, first, measure) as watch:
        for done in range(first + 1, args.epochs + 1):
            key = jax.random.fold_in(for_order, done)
            params, state, loss = epoch(run["params"], run["state"], key)
            run = {
                "params": params,
                "state": state,
                "done": jnp.asarray(done, jnp.int32),
                "losses": run["losses"].at[done - 1].set(loss),
            }
            if checkpoints is not None:
                checkpoints.save(done, run)
            if args.plot is not None:
                seen.append((done, jp.explain(NET, LOSS, params, train_x, train_y, keep=0)))
            watch.update(done, len(train_y), loss, params)
            if watch.off:
                watch.print(f"epoch {done:3d}  loss {loss:.4f}")
    if checkpoints is not None:
        checkpoints.close()

    held_out = float(accuracy(run["params"], test_x, test_y))
    print(f"accuracy {held_out:.2%} on {len(test_y)} digits held out of training")
    if args.plot is not None:
        plot(run["losses"], held_out, args)
        draw(NET, LOSS, run["params"], train_x[:200], train_y[:200], seen, "epoch", args.plot)
    return held_out


def plot(losses: Any, held_out: float, args: argparse.Namespace) -> None:
    """Save the loss curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.semilogy(range(1, len(losses) + 1), losses)
    axes.set(xlabel="epoch", ylabel="cross-entropy, mean over the epoch")
    axes.set_title(f"Digits, gradient by {args.grad}: {held_out:.2%} of the held-out digits right")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(args.plot, dpi=150)
    print(f"loss curve in {args.plot}")


def main() -> None:
    parser = Parser("Train an MLP on scikit-learn's digits.")
    parser.add(
        ("grad", DIFFERENTIATE, "hand", "the hand-written chain or autodiff"),
        ("epochs", positive, 30, "number of epochs"),
        ("batch", positive, 16, "digits per step"),
        ("rate", above_zero, 0.03, "initial rate of SGD with momentum"),
        ("seed", natural, 0, "seed of the run"),
        ("plot", picture, None, "save the loss curve and the gradients"),
    )
    parser.add_checkpoints("after every epoch")
    args = parser.parse()
    train(args)


if __name__ == "__main__":
    run(main)
