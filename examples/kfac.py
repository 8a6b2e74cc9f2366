"""Compare KFAC, written as an optax transformation, with tuned SGD on handwritten digits.

    python examples/kfac.py --plot kfac.png

Each step computes the gradient and the Kronecker factors of the Gauss-Newton matrix from one
forward pass. For a weight with gradient G and factors a and b, the preconditioned gradient is
(a + pi r I)^-1 G (b + r/pi I)^-1. Here r^2 is the damping, and pi the square root of the ratio of
the factors' mean eigenvalues (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671). The
learning rate is tuned for each method. Both start from the same params and see the same batches.
"""

import argparse
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from digits import load
from jax.scipy.linalg import cho_factor, cho_solve
from options import Parser, above_zero, natural, picture, positive, run

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(128), jp.Tanh(), jp.Dense(64), jp.Tanh(), jp.Dense(10))
SGD_RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
KFAC_RATES = (0.02, 0.03, 0.05, 0.07)


class KfacState(NamedTuple):
    """The state of ``scale_by_kfac``.

    Attributes:
        count: the number of steps so far.
        factors: the moving average of the Kronecker factors, without the bias correction.
    """

    count: Any
    factors: Any


def is_kronecker(node: Any) -> bool:
    """Return whether a node is a pair of Kronecker factors."""
    return isinstance(node, jp.Kronecker)


def scale_by_kfac(damping: float, decay: float) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that preconditions the gradient by averaged Kronecker factors.

    Its ``update`` takes ``factors``, a tree like params with a ``jp.Kronecker`` at each leaf.

    Args:
        damping: the damping r^2.
        decay: the decay of the exponential moving average of the factors.
    """

    def init(params: Any) -> KfacState:
        def zeros(param: Any) -> jp.Kronecker:
            i, o = param.shape if param.ndim == 2 else (1, *param.shape)
            return jp.Kronecker(jnp.zeros((i, i)), jnp.zeros((o, o)))

        return KfacState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: Any, state: KfacState, params: Any = None, *, factors: Any, **extra: Any
    ) -> tuple[Any, KfacState]:
        del params, extra
        count = state.count + 1
        averaged = jax.tree.map(lambda m, f: decay * m + (1 - decay) * f, state.factors, factors)
        debias = 1 / (1 - decay**count)

        def precondition(pair: jp.Kronecker, grad: Any) -> Any:
            a, b = pair.a * debias, pair.b * debias
            root = jnp.sqrt(damping)
            pi = jnp.sqrt((jnp.trace(a) / len(a)) / (jnp.trace(b) / len(b) + 1e-12))
            left = cho_factor(a + pi * root * jnp.eye(len(a)))
            right = cho_factor(b + root / pi * jnp.eye(len(b)))
            half = cho_solve(left, grad.reshape(len(a), len(b)))
            return cho_solve(right, half.T).T.reshape(grad.shape)

        updates = jax.tree.map(precondition, averaged, updates, is_leaf=is_kronecker)
        return updates, KfacState(count, averaged)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def kfac(rate: Any, damping: float = 1e-2, decay: float = 0.95) -> Any:
    """Return KFAC with momentum 0.9."""
    return optax.chain(
        scale_by_kfac(damping, decay), optax.trace(0.9), optax.scale_by_learning_rate(rate)
    )


def make_run(by_kfac: bool, data: tuple[Any, Any], batch: int, steps: int, seed: int) -> Any:
    """Return a jitted ``run(rate) -> losses``, the loss on all training digits before each step."""
    images, labels = data
    asked: dict[str, Any] = {"factors": jp.KroneckerFactors(samples=1)} if by_kfac else {}
    quantities = jp.quantities(NET, LOSS, grads=jp.Gradient(), **asked)
    whole = jp.loss_fn(NET, LOSS)
    for_init, for_steps = jax.random.split(jax.random.key(seed))

    @jax.jit
    def run(rate: Any) -> Any:
        optimizer = kfac(rate) if by_kfac else optax.sgd(rate, momentum=0.9)
        params = NET.init(for_init, images[:1])

        def step(carry: Any, key: Any) -> tuple[Any, Any]:
            params, state = carry
            for_rows, for_samples = jax.random.split(key)
            rows = jax.random.choice(for_rows, len(labels), (batch,), replace=False)
            x, target = images[rows], labels[rows]
            loss = whole(params, images, labels)
            result = quantities(params, x, target, key=for_samples)
            extra = {name: result[name] for name in asked}
            updates, state = optimizer.update(result["grads"], state, params, **extra)
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(for_steps, steps)
        _, losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return losses

    return run


def steps_to(losses: Any, threshold: float) -> int | None:
    """Return the steps until the loss stays below the threshold, or None if it never does."""
    above = jnp.flatnonzero(~(losses < threshold))
    first = int(above[-1]) + 1 if above.size else 0
    return first if first < len(losses) else None


def best(run: Any, rates: tuple[float, ...], threshold: float) -> tuple[int, float, Any]:
    """Return the steps, the rate and the losses of the rate that reaches the threshold first."""
    reached = []
    for rate in rates:
        losses = run(rate)
        steps = steps_to(losses, threshold)
        reaching = "never" if steps is None else f"{steps:4d} steps"
        print(f"    rate {rate:<5g} {reaching}", flush=True)
        if steps is not None:
            reached.append((steps, rate, losses))
    if not reached:
        sys.exit(f"no rate reaches {threshold:g}: give more --steps")
    return min(reached, key=lambda entry: entry[0])


def main() -> None:
    parser = Parser("KFAC against tuned SGD on scikit-learn's digits.")
    parser.add(
        ("steps", positive, 200, "steps for each rate"),
        ("batch", positive, 256, "digits per step"),
        ("threshold", above_zero, 0.02, "training loss to reach"),
        ("seed", natural, 0, "seed of the run"),
        ("plot", picture, None, "save the loss curves"),
    )
    args = parser.parse()
    train_x, train_y, _, _ = load(args.seed)

    curves = {}
    for name, by_kfac, rates in (("SGD", False, SGD_RATES), ("KFAC", True, KFAC_RATES)):
        print(f"{name}, momentum 0.9: steps to a training loss below {args.threshold:g}")
        run = make_run(by_kfac, (train_x, train_y), args.batch, args.steps, args.seed)
        curves[name] = best(run, rates, args.threshold)
    fewest = {name: steps for name, (steps, _, _) in curves.items()}
    times = fewest["SGD"] / fewest["KFAC"]
    print(f"KFAC {fewest['KFAC']} steps, SGD {fewest['SGD']} steps: {times:.1f} times as many")
    if args.plot is not None:
        plot(curves, args)


def plot(curves: dict[str, Any], args: argparse.Namespace) -> None:
    """Save the loss curve of the best rate of each method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, (steps, rate, losses) in curves.items():
        axes.semilogy(losses, label=f"{name}, rate {rate:g}: {steps} steps")
    axes.axhline(args.threshold, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="cross-entropy on all training digits")
    axes.set_title("Digits: the best learning rate of each, the same batches")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.plot, dpi=150)
    print(f"loss curves in {args.plot}")


if __name__ == "__main__":
    run(main)
