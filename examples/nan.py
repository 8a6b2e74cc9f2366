"""Find where a NaN was born, by three tools: jax.debug_nans, Equinox's backward_nan and jaxprop.

    python examples/nan.py

Three functions fail at one example of a batch. ``jax.debug_nans`` stops at the first primitive with
a NaN in its result, which on the way back is one that nobody wrote. In ``jax.jit``, the line it
names is that of the call; without it, the traceback leads to the line that was differentiated. In a
scan, it stops at the scan. ``equinox.debug.backward_nan`` prints the cotangent at a spot that must
be known beforehand. ``jp.find_nonfinite`` takes the function as it is, and the batch. If Equinox is
not installed, its part is left out.
"""

import importlib.util
import re
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from options import Parser, run

import jaxprop as jp

Fn = Callable[[Array, Array], Array]
X, PARAMS = jnp.array([[1.0, 1.5], [0.0, 0.0], [3.0, 5.0]]), jnp.ones(2)
SPOTS: list[Callable[[Array], Array]] = []


def spot(h: Array) -> Array:
    """Return h, passed through backward_nan while that is tried."""
    return SPOTS[-1](h) if SPOTS else h


def masked_root(params: Array, x: Array) -> Array:
    h = spot(x * params)
    root = jnp.sqrt(h)
    return jnp.where(h > 0, root, 0).sum(axis=-1)


def distance(params: Array, x: Array) -> Array:
    h = spot(x * params)
    return jnp.linalg.norm(h, axis=-1)


def recurrent(params: Array, x: Array) -> Array:
    def step(h: Array, x_t: Array) -> tuple[Array, None]:
        h = spot(jnp.sqrt(h - x_t))
        return h, None

    return jax.lax.scan(step, jnp.full(len(x), 4.0), (x * params).T)[0]


def main() -> None:
    Parser("Find where a NaN was born, by three tools.").parse()
    for fn in (masked_root, distance, recurrent):
        print(f"{fn.__name__}\n{'=' * len(fn.__name__)}\n-- jax.debug_nans, of a step in jax.jit")
        print(debug_nans(fn, jax.jit))
        print("-- jax.debug_nans, without")
        print(debug_nans(fn, lambda step: step))
        if importlib.util.find_spec("equinox"):
            print("-- equinox.debug.backward_nan, at a spot that was guessed")
            backward_nan(fn)
        print("-- jp.find_nonfinite")
        print(jp.find_nonfinite(jp.function(fn), jp.Mean(), PARAMS, X), end="\n\n")


def gradient(fn: Fn) -> Callable[[Array], Array]:
    return jax.grad(lambda params: jnp.mean(fn(params, X)))


def debug_nans(fn: Fn, compiled: Callable[[Any], Any]) -> str:
    """Return what debug_nans says, and the innermost line of this file in its traceback."""
    step = compiled(gradient(fn))
    try:
        with jax.debug_nans(True):
            step(PARAMS)
    except FloatingPointError as error:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        line = [frame.line for frame in frames if frame.filename == __file__][-1]
        said = re.search(r"invalid value \(\w+\) encountered in \S+", str(error))
        return f"{said and said.group()}\n    {line}"
    return "nothing"


def backward_nan(fn: Fn) -> None:
    """Print the cotangent at the spot by backward_nan."""
    import equinox as eqx

    SPOTS.append(lambda h: eqx.debug.backward_nan(h, name="h", terminate=False))
    gradient(fn)(PARAMS)
    jax.effects_barrier()
    SPOTS.pop()


if __name__ == "__main__":
    run(main)
