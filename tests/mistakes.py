"""Helpers for the tables of mistakes: small nets, and the type of a row.

A row is a plausible mistake and the sentence that answers it: what was given, what is taken, what
to write. It is in the user's words, and not in JAX's. Add a row for each mistake that users make.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
COMPLEX = X.astype(complex)
TARGET, T2 = jnp.array([0, 1, 1, 0]), jnp.ones((4, 2))
IMAGE, SEQUENCE, IDS = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 4, 12)), jnp.zeros((2, 4), int)
MASK = jnp.ones((2, 4), bool)
NET = jp.chain(jp.Dense(5), jp.Relu(), jp.Dense(2))
WIDE = jp.chain(jp.Dense(6), jp.Relu(), jp.Dense(2))
PARAMS, OTHER = NET.init(KEY, X), WIDE.init(KEY, X)
CE, SE, BCE = jp.CrossEntropy(), jp.HalfSquaredError(), jp.BinaryCrossEntropy()


class Mistake(NamedTuple):
    """A mistake in a user's code, and the error that answers it."""

    wrong: Callable[[], Any]
    error: type[Exception]
    sentence: str


def mistakes(error: type[Exception], **rows: tuple[Callable[[], Any], str]) -> dict[str, Mistake]:
    """Mistakes of one type of error, by name."""
    return {name: Mistake(wrong, error, sentence) for name, (wrong, sentence) in rows.items()}


def check(mistake: Mistake) -> None:
    """Assert that the mistake raises its error, with its sentence in the message or in a note."""
    with pytest.raises(mistake.error) as caught:
        mistake.wrong()
    said = "\n".join(map(str, [*caught.value.args, *getattr(caught.value, "__notes__", ())]))
    assert mistake.sentence in said, said


def value(net=NET, loss=CE, params=PARAMS, x=X, target=TARGET, **options):
    """The loss and its gradient, on arguments that are right except for those given."""
    return traced(jp.value_and_grad(net, loss), params, x, target, **options)


def traced(f, *args, **options):
    """The shapes that f returns for concrete arguments, without compiling it."""
    return jax.eval_shape(lambda: f(*args, **options))


def without_x64(function):
    with jax.enable_x64(False):
        return function()
