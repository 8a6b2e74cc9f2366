"""Many training steps in one compiled program, shared by the examples on text."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def make_steps(update: Callable[..., Any], batch: Callable[[Any], tuple[Any, Any]]) -> Any:
    """Return a jitted ``steps(params, state, each) -> (params, state, mean loss)``, one scan.

    Args:
        update: the training step, as ``jp.make_update`` returns it.
        batch: a function that returns the (x, target) of one step from its entry in ``each``,
            which has one entry per step.
    """

    @functools.partial(jax.jit, donate_argnames=("params", "state"))
    def steps(params: Any, state: Any, each: Any) -> tuple[Any, Any, Any]:
        def step(carry: Any, one: Any) -> tuple[Any, Any]:
            params, state, value = update(*carry, *batch(one))
            return (params, state), value

        (params, state), values = jax.lax.scan(step, (params, state), each)
        return params, state, values.mean()

    return steps
