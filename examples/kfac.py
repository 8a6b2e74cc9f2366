"""Train the classical deep autoencoder, here of 8 x 8 digits, by K-FAC and by tuned Adam.

    python examples/kfac.py --plot kfac.png

The nets of Hinton and Salakhutdinov 2006 (https://doi.org/10.1126/science.1127647), of Martens 2010
and of the K-FAC paper (https://arxiv.org/abs/1503.05671) squeeze a digit through a few units, which
first-order methods learn slowly. Each method takes full-batch steps from the same params until its
loss stays below a threshold. Adam is given each of its rates, and the best one counts; K-FAC finds
its own step sizes, momentum and damping. The time is that of the compiled steps alone.
"""

import argparse
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from digits import load
from options import Parser, above_zero, natural, picture, positive, run

import jaxprop as jp

LOSS = jp.BinaryCrossEntropy()
RATES = (1e-3, 3e-3, 1e-2, 2e-2)
CODE = 6


def autoencoder(widths: tuple[int, ...] = (128, 64, 32)) -> jp.Layer:
    """Return a net from 64 pixels, through ``CODE`` units without an activation, to 64 logits."""
    down = [layer for width in widths for layer in (jp.Dense(width), jp.Tanh())]
    up = [layer for width in widths[::-1] for layer in (jp.Dense(width), jp.Tanh())]
    return jp.chain(*down, jp.Dense(CODE), *up, jp.Dense(64))


def losses(optimizer: Any, params: Any, x: Any, steps: int) -> tuple[Any, float]:
    """Return the loss before each step, and the seconds per step."""
    update = jp.make_update(autoencoder(), LOSS, optimizer)

    @jax.jit
    def trained(params: Any, x: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, Any]:
            params, state = carry
            params, state, value = update(params, state, x, x)
            return (params, state), value

        return jax.lax.scan(step, (params, update.init(params)), length=steps)[1]

    compiled = trained.lower(params, x).compile()
    start = time.perf_counter()
    values = np.asarray(jax.block_until_ready(compiled(params, x)))
    return values, (time.perf_counter() - start) / steps


def steps_to(values: Any, threshold: float) -> int | None:
    """Return the steps until the loss stays below the threshold, or None if it never does."""
    above = np.flatnonzero(~(values < threshold))
    first = int(above[-1]) + 1 if above.size else 0
    return first if first < len(values) else None


def reached(name: str, values: Any, seconds: float, threshold: float) -> int | None:
    """Print and return the steps to the threshold."""
    steps = steps_to(values, threshold)
    found = "never" if steps is None else f"{steps:5d} steps, {steps * seconds:5.1f} s"
    each = f"{1e3 * seconds:6.1f} ms a step, ends at {values[-1]:.4f}"
    print(f"{name:18} {found:21} {each}", flush=True)
    return steps


def draw(curves: dict[str, Any], args: argparse.Namespace) -> None:
    """Save the loss curves."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in curves.items():
        axes.plot(np.arange(1, len(values) + 1), values, label=name)
    axes.axhline(args.threshold, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="loss of all digits", xscale="log", ylim=(0.21, 0.5))
    axes.set_title("An autoencoder of digits, 64-128-64-32-6-32-64-128-64")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.plot, dpi=130)


def main() -> None:
    parser = Parser("K-FAC against tuned Adam, on a deep autoencoder of scikit-learn's digits.")
    parser.add(
        ("steps", positive, 300, "steps of K-FAC"),
        ("adam-steps", positive, 4000, "steps of Adam, for each rate"),
        ("threshold", above_zero, 0.23, "training loss to reach"),
        ("seed", natural, 0, "seed of the params"),
        ("plot", picture, None, "save the loss curves"),
    )
    args = parser.parse()
    x, *_ = load(0)
    params = autoencoder().init(jax.random.key(args.seed), x[:1])
    print(f"steps until the loss of {len(x)} digits stays below {args.threshold:g}\n")
    curves, fewest = {}, {}
    for rate in RATES:
        values, seconds = losses(optax.adam(rate), params, x, args.adam_steps)
        steps = reached(f"Adam, rate {rate:g}", values, seconds, args.threshold)
        if steps is not None and steps < fewest.get("Adam", (np.inf,))[0]:
            fewest["Adam"], curves["Adam"] = (steps, steps * seconds), values
    optimizer = jp.kfac(autoencoder(), LOSS, (params, x, x), damping=1e-2)
    values, seconds = losses(optimizer, params, x, args.steps)
    steps = reached("K-FAC", values, seconds, args.threshold)
    if steps is None or not fewest:
        sys.exit("\none of them did not reach the threshold: give more steps, or a higher one")
    curves["K-FAC"] = values
    (adam, adam_s), kfac_s = fewest["Adam"], steps * seconds
    times = f"{adam / steps:.1f} times as many, {adam_s / kfac_s:.1f} times the time"
    print(f"\nK-FAC {steps} steps, Adam {adam} steps: {times}")
    if args.plot is not None:
        draw(curves, args)


if __name__ == "__main__":
    run(main)
