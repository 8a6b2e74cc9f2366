"""Find the training digits behind a net's answers, by influence with EKFAC.

    python examples/influence.py --plot influence.png

A share of the labels is flipped before training. The self-influence of a digit, its effect on its
own loss, is large where no other digit explains it, so that flipped labels rank first. The area
under the curve says how often a flipped label ranks above a right one; the gradient norm, the loss
and a coin are there for comparison. Then the predictions of influence are tested: a small net is
retrained without each of some digits, and its loss on held-out digits is compared with the
prediction. The picture has the training digits that helped some held-out digits most, and those
that harmed them most.
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
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(64), jp.Tanh(), jp.Dense(10))
DECAY, SMALL_DECAY = 1e-3, 3e-2  # weight decay, and the damping of the curvature
SMALL = jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(10))


@functools.partial(jax.jit, static_argnames=("net", "steps"))
def train(
    net: Any, params: Any, x: Any, target: Any, decay: Any, steps: int, weights: Any = None
) -> Any:
    """Return the params after full-batch steps, with decay / 2 |params|^2 added to the loss."""
    rate = optax.cosine_decay_schedule(0.02, steps)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(rate))
    update = jp.make_update(net, LOSS, optimizer)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        params, state, _ = update(params, state, x, target, weights=weights, divisor=len(x))
        return (params, state), None

    return jax.lax.scan(step, (params, update.init(params)), length=steps)[0][0]


def flipped(labels: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Return labels with a share of them moved to another class, and which those are."""
    rng = np.random.default_rng(seed)
    which = np.zeros(len(labels), bool)
    which[rng.choice(len(labels), round(share * len(labels)), replace=False)] = True
    moved = (np.asarray(labels) + rng.integers(1, 10, len(labels))) % 10
    return jnp.where(which, moved, labels), which


def left_out(x: Any, target: Any, held: Any, args: argparse.Namespace) -> dict[str, float]:
    """Return Spearman's correlation of the predicted and the true effect of leaving one digit out.

    The effect is on the mean loss over held-out digits. The net is small and has more weight decay,
    so that each training finds the same minimum. The prediction is made with EKFAC, and with the
    Hessian itself, by conjugate gradients.
    """
    mean = jp.loss_fn(SMALL, LOSS)
    params = SMALL.init(jax.random.key(args.seed), x[:1])
    params = train(SMALL, params, x, target, SMALL_DECAY, 10 * args.steps)
    curvature = jp.curvature.ekfac_factors(SMALL, LOSS)(params, x, target)
    each = jp.curvature.influence(SMALL, LOSS)(params, (x, target), held, curvature, SMALL_DECAY)
    product = jp.hvp(SMALL, LOSS)(params, x, target)

    def damped(v: Any) -> Any:
        return jax.tree.map(lambda hv, v: hv + SMALL_DECAY * v, product(v), v)

    _, grads = jp.value_and_grad(SMALL, LOSS)(params, *held)
    solved, _ = jax.scipy.sparse.linalg.cg(damped, grads, maxiter=300)
    of_each = jax.vmap(
        lambda x, y: jax.jvp(lambda p: mean(p, x[None], y[None]), (params,), (solved,))
    )
    _, exact = of_each(x, target)

    def without(n: Any) -> Any:
        weights = jnp.ones(len(x)).at[n].set(0)
        return mean(train(SMALL, params, x, target, SMALL_DECAY, 3 * args.steps, weights), *held)

    some = jnp.linspace(0, len(x) - 1, args.left_out).astype(int)
    found = np.asarray(jax.lax.map(without, some))
    predicted = {"EKFAC": each.mean(axis=1), "the Hessian": exact}
    return {name: float(np.asarray(spearmanr(p[some], found))[0]) for name, p in predicted.items()}


def draw(x: Any, target: Any, held: Any, found: Any, path: Any) -> None:
    """Draw held-out digits, each with the training digits that helped and that harmed it most."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(held[0]), 9, figsize=(9, 1.25 * len(held[0])))
    for row, image, label, scores in zip(panels, *held, found.T, strict=True):
        order = np.argsort(-scores)
        shown = [(image, label, ""), *((x[n], target[n], f"{scores[n]:+.1f}") for n in order[:4])]
        shown += [(x[n], target[n], f"{scores[n]:+.1f}") for n in order[:-5:-1]]
        for axes, (pixels, name, score) in zip(row, shown, strict=True):
            axes.imshow(np.asarray(pixels).reshape(8, 8), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}  {score}", fontsize=8)
    for column, text in ((0, "held out"), (1, "helped most"), (5, "harmed most")):
        panels[0, column].set_title(text + "\n" + panels[0, column].get_title(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser("Influence of training digits, with 5 %% of their labels flipped.")
    parser.add(
        ("steps", positive, 300, "full-batch steps of Adam"),
        ("share", above_zero, 0.05, "of the labels that are flipped"),
        ("left-out", positive, 60, "how many digits are left out, one by one"),
        ("seed", natural, 0, "seed of the split, the flips and the params"),
        ("plot", picture, None, "draw the most helpful and harmful digits into this file"),
    )
    args = parser.parse()
    x, labels, test_x, test_y = load(args.seed)
    target, wrong = flipped(labels, args.share, args.seed)
    params = train(NET, NET.init(jax.random.key(args.seed), x[:1]), x, target, DECAY, args.steps)
    right = jnp.mean(NET(params, test_x).argmax(-1) == test_y)
    print(f"{wrong.sum()} of {len(x)} labels flipped; {100 * right:.1f}% right on held-out digits")

    curvature = jp.curvature.ekfac_factors(NET, LOSS)(params, x, target)
    alone = jp.curvature.self_influence(NET, LOSS)(params, x, target, curvature, DECAY)
    losses, _ = LOSS.forward(NET(params, x), target)
    coin = np.random.default_rng(args.seed).random(len(x))
    norms = jp.per_example_sq_norms(NET, LOSS)(params, x, target)
    print("\nfinding the flipped labels      area under the curve")
    ranks = {"self-influence, EKFAC": alone, "gradient norm": norms, "loss": losses, "coin": coin}
    for name, score in ranks.items():
        print(f"{name:31} {roc_auc_score(wrong, score):.3f}")

    some = x[:200], target[:200]
    held = test_x[:100], test_y[:100]
    print(f"\nleaving out one of 200 digits, {args.left_out} times   Spearman's correlation")
    for name, correlation in left_out(*some, held, args).items():
        print(f"influence by {name:18} {correlation:.2f}")
    if args.plot is not None:
        held = test_x[:5], test_y[:5]
        of_pairs = jax.jit(jp.curvature.influence(NET, LOSS))
        found = of_pairs(params, (x, target), held, curvature, DECAY)
        draw(x, target, held, np.asarray(found), args.plot)


if __name__ == "__main__":
    run(main)
