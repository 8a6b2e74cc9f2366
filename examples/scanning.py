"""Many steps of training as one program, which the examples on text share."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def make_steps(update: Callable[..., Any], batch: Callable[[Any], tuple[Any, Any]]) -> Any:
    """A jitted ``steps(params, state, each) -> (params, state, mean loss)``: one scan.

    ``each`` has an entry a step, from which ``batch`` makes that step's (x, target).
    """

    @functools.partial(jax.jit, donate_argnames=("params", "state"))
    def steps(params: Any, state: Any, each: Any) -> tuple[Any, Any, Any]:
        def step(carry: Any, one: Any) -> tuple[Any, Any]:
            params, state, value = update(*carry, *batch(one))
            return (params, state), value

        (params, state), values = jax.lax.scan(step, (params, state), each)
        return params, state, values.mean()

    return steps
