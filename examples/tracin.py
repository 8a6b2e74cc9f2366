"""Trace a network's answer for a digit to the training digits that taught it, by TracIn.

    python examples/tracin.py

The influence of a training digit on a test digit is the sum over checkpoints of the learning rate
times the inner product of their gradients (Pruthi et al. 2020, https://arxiv.org/abs/2002.08484):
about how much the steps on the former lowered the loss on the latter. A few training labels are
made wrong first. A digit's influence on itself, from its squared gradient norms, is large where the
label is wrong. How well it finds wrong labels is the area under the curve: the chance that a wrong
label has more self-influence than a right one.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from digits import load, make_epoch
from options import Parser, above_zero, natural, positive, run
from sklearn.metrics import roc_auc_score

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(64), jp.Gelu(), jp.Dense(10))


def trace(args: argparse.Namespace) -> None:
    """Train, add up influences over one checkpoint per epoch, and print what they find."""
    images, right, *test = load(args.seed)
    for_flips, for_init, for_order = jax.random.split(jax.random.key(args.seed), 3)
    for_which, for_what = jax.random.split(for_flips)
    wrong = jnp.zeros(len(right), bool).at[: int(args.flipped * len(right))].set(True)
    wrong = jax.random.permutation(for_which, wrong)
    others = (right + jax.random.randint(for_what, right.shape, 1, 10)) % 10
    labels = jnp.where(wrong, others, right)
    seen = test[0][: args.digits], test[1][: args.digits]

    between, own = jp.inner_products(NET, LOSS), jp.per_example_sq_norms(NET, LOSS)

    @jax.jit
    def influences(params: Any) -> tuple[Any, Any]:
        both = between(params, (images, labels), seen), own(params, images, labels)
        return jax.tree.map(lambda each: args.rate * each, both)

    update = jp.make_update(NET, LOSS, optax.sgd(args.rate))
    epoch = make_epoch(update, images, labels, args.batch)
    params = NET.init(for_init, images[:1])
    state, found = update.init(params), influences(params)
    for key in jax.random.split(for_order, args.epochs):
        params, state, _ = epoch(params, state, key)
        found = jax.tree.map(jnp.add, found, influences(params))
    on_test, on_itself = found

    predicted = NET(params, seen[0]).argmax(-1)
    print("test digit           the training digits that helped most, and harmed most")
    for m in range(args.digits):
        order = jnp.argsort(on_test[:, m])
        helped, harmed = (
            " ".join(f"{labels[n]}{'!' if wrong[n] else ' '}" for n in row)
            for row in (order[-1 : -1 - args.shown : -1], order[: args.shown])
        )
        print(f"a {seen[1][m]}, taken for a {predicted[m]}    {helped}     {harmed}")
    print(f"\n! a label made wrong, as {wrong.sum()} of {len(labels)} were; seed {args.seed}")
    last = jnp.argsort(-on_itself)[: wrong.sum()]
    print(f"wrong labels among the {len(last)} of most self-influence: {wrong[last].sum()}")
    print(f"self-influence and flipped labels: area {roc_auc_score(wrong, on_itself):.3f}")


def main() -> None:
    parser = Parser("TracIn on scikit-learn's digits.")
    parser.add(
        ("epochs", positive, 20, "epochs, with a checkpoint each"),
        ("batch", positive, 16, "digits per step"),
        ("rate", above_zero, 0.1, "learning rate of SGD"),
        ("flipped", above_zero, 0.05, "share of the training labels that are made wrong"),
        ("digits", positive, 5, "test digits to explain"),
        ("shown", positive, 6, "training digits to print of each kind"),
        ("seed", natural, 0, "seed of the split, the flips and the params"),
    )
    trace(parser.parse())


if __name__ == "__main__":
    run(main)
