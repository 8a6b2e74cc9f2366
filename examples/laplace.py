"""How sure a net is of noisy digits, and how sure it should be: the Laplace approximation.

    python examples/laplace.py --plot laplace.png

A net is trained on clean digits, and asked about held-out ones with more and more noise. It stays
sure of itself where it is wrong. The Laplace approximation is a normal distribution of the params
around the trained ones, with the Gauss-Newton matrix for its precision and a prior chosen by the
evidence. It takes into account how the logits vary: with the last layer alone, which is the usual
choice, and with all layers, which is too unsure of digits without noise. The table has the negative
log likelihood (NLL) of the right class and the expected calibration error (ECE, Guo et al. 2017,
https://arxiv.org/abs/1706.04599, 15 bins), the difference between the confidence and the share of
right answers.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import load
from options import Parser, natural, picture, positive, run

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(64), jp.Tanh(), jp.Dense(64), jp.Tanh(), jp.Dense(10))
PRIOR = 1.0  # the prior's precision in training, for the params of largest posterior density
NOISES, BATCH, BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), 32, 15


def train(args: argparse.Namespace, x: Any, target: Any) -> Any:
    """Return the params of the net after ``args.epochs`` epochs of Adam."""
    batches, key = len(x) // BATCH, jax.random.key(args.seed)
    optimizer = optax.chain(optax.add_decayed_weights(PRIOR / len(x)), optax.adam(3e-3))
    update = jp.make_update(NET, LOSS, optimizer)
    params = NET.init(key, x[:1])

    def step(carry: Any, rows: Any) -> tuple[Any, Any]:
        params, state = carry
        params, state, value = update(params, state, x[rows], target[rows])
        return (params, state), value

    keys = jax.random.split(key, args.epochs)
    orders = jnp.concatenate([jax.random.permutation(k, len(x))[: batches * BATCH] for k in keys])
    carry = params, update.init(params)
    (params, _), _ = jax.lax.scan(step, carry, orders.reshape(-1, BATCH))
    return params


def scores(p: Any, target: Any) -> tuple[float, float, float]:
    """Return the share of right answers, the NLL and the ECE of probabilities (N, C)."""
    p, target = np.asarray(p, float), np.asarray(target)
    sure, right = p.max(axis=1), p.argmax(axis=1) == target
    inside = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs(np.sum((right - sure)[inside == b])) for b in range(BINS)]
    nll = -np.log(np.maximum(p[np.arange(len(p)), target], 1e-12)).mean()
    return float(right.mean()), float(nll), float(sum(gaps) / len(p))


def draw(found: dict[str, Any], path: Any) -> None:
    """Draw NLL and ECE over the noise."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, rows in found.items():
        for axes, column in zip(panels, (1, 2), strict=True):
            axes.plot(NOISES, [row[column] for row in rows], marker="o", markersize=3, label=name)
    for axes, title in zip(panels, ("negative log likelihood", "calibration error"), strict=True):
        axes.set(title=title, xlabel="noise, standard deviation", ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser("A net that knows what it does not know, on noisy digits.")
    parser.add(
        ("epochs", positive, 60, "passes over the training digits"),
        ("seed", natural, 0, "seed of the split, the params and the noise"),
        ("plot", picture, None, "draw the table into this file"),
    )
    args = parser.parse()
    train_x, train_y, test_x, test_y = load(args.seed)
    params = train(args, train_x, train_y)
    last = *map(jp.freeze, params[:-1]), params[-1]
    posteriors: dict[str, Any] = {}
    kinds: tuple[tuple[str, Any, Any], ...] = (
        ("last layer", last, "kronecker"),
        ("all, diagonal", params, "diagonal"),
        ("all, Kronecker", params, "kronecker"),
    )
    for name, at, structure in kinds:
        around: Any = jax.jit(jp.laplace(NET, LOSS, structure=structure))
        posteriors[name] = around(at, train_x, train_y).tuned()
        print(f"{name:15} prior's precision {posteriors[name].prior:.2g}", flush=True)

    found: dict[str, list[Any]] = {name: [] for name in ("point", *posteriors)}
    noise = jax.random.normal(jax.random.key(args.seed), test_x.shape)
    for deviation in NOISES:
        x = test_x + deviation * noise
        found["point"].append(scores(jax.nn.softmax(NET(params, x)), test_y))
        for name, posterior in posteriors.items():
            found[name].append(scores(posterior.probabilities(x), test_y))
    print("\nnoise  right  " + "".join(f"{name:>16}" for name in found))
    print(" " * 14 + "        NLL  ECE" * len(found))
    for n, deviation in enumerate(NOISES):
        row = "".join(f"{rows[n][1]:11.2f} {rows[n][2]:4.2f}" for rows in found.values())
        print(f"{deviation:5.1f} {100 * found['point'][n][0]:5.0f}%  {row}")
    means = {name: np.mean(rows, axis=0) for name, rows in found.items()}
    row = "".join(f"{nll:11.2f} {ece:4.2f}" for _, nll, ece in means.values())
    print(f" mean {100 * means['point'][0]:5.0f}%  {row}")
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    run(main)
