"""Comparison of two functions that run in turn, in one process, on JAX's default device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Traced

from jaxprop.core.types import PyTree

TRACES = 9

Function = Callable[..., PyTree]
Make = Callable[[], Function]
"""A function without arguments that returns a new function of arrays at each call."""


class Spread(NamedTuple):
    """The median and the quartiles of some samples.

    Attributes:
        median: the median.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Return the spread of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


class Program(NamedTuple):
    """The cost of one compiled function.

    Attributes:
        run: the time of a call, in seconds.
        trace: the time to trace it, in seconds.
        compile: the time to lower and compile it, in seconds.
        temp_bytes: its temporary memory.
        flops: the floating-point operations of a call; None if it has a loop, whose iterations XLA
            does not count.
    """

    run: Spread
    trace: Spread
    compile: Spread
    temp_bytes: int
    flops: float | None


class Comparison(NamedTuple):
    """The costs of two functions, and the ratios A / B of neighbouring samples.

    Attributes:
        a: the costs of A.
        b: the costs of B.
        run: the ratios of the times of a call.
        trace: the ratios of the times to trace.
        compile: the ratios of the times to compile.
        temp: the ratio of the temporary memories; None if B uses none.
    """

    a: Program
    b: Program
    run: Spread
    trace: Spread
    compile: Spread
    temp: float | None


def compare(
    make_a: Make,
    make_b: Make,
    args: tuple[PyTree, ...],
    *,
    carried: int = 0,
    seconds: float,
    builds: int,
) -> Comparison:
    """Measure two functions A and B: trace them in turn, compile them in turn, run them in turn.

    Args:
        make_a: makes A, a new function at each call, so that JAX has nothing cached for it.
        make_b: makes B, in the same way.
        args: the arguments of both functions.
        carried: the number of leading args that are donated; in the next call, the leading results
            take their places.
        seconds: about how long to run; at least three pairs of samples are taken.
        builds: how many times to compile each.

    Returns:
        The costs of both, and their ratios.
    """
    makers = (make_a, make_b)
    traces = [[_trace(make, args, carried)[0] for make in makers] for _ in range(TRACES + 1)][1:]
    built = [[_compile(make, args, carried) for make in makers] for _ in range(builds + 1)][1:]
    run_a, run_b = (_Calls(compiled, args, carried) for _, compiled in built[-1])
    pairs = in_turn(run_a, run_b, seconds)

    def program(side: int) -> Program:
        compiled = built[-1][side][1]
        return Program(
            run=Spread.of([pair[side] for pair in pairs]),
            trace=Spread.of([trace[side] for trace in traces]),
            compile=Spread.of([build[side][0] for build in built]),
            temp_bytes=temp_bytes(compiled),
            flops=_flops(compiled),
        )

    a, b = program(0), program(1)
    return Comparison(
        a,
        b,
        run=Spread.of([x / y for x, y in pairs]),
        trace=Spread.of([x / y for x, y in traces]),
        compile=Spread.of([x[0] / y[0] for x, y in built]),
        temp=a.temp_bytes / b.temp_bytes if b.temp_bytes else None,
    )


def in_turn(
    a: Callable[[], object], b: Callable[[], object], seconds: float
) -> list[tuple[float, float]]:
    """Return pairs of times per call, of A and of B, which take turns to run first.

    Args:
        a: A. If it returns JAX arrays, its time includes the wait for them.
        b: B, timed in the same way.
        seconds: about how long to run; at least three pairs of samples are taken.
    """
    calls = max(1, round(0.005 / max(min(_time(a, 1), _time(b, 1)), 1e-7)))
    pairs = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(pairs) < 3 or time.perf_counter() < end:
        if len(pairs) % 2:
            time_b = _time(b, calls)
            pairs.append((_time(a, calls), time_b))
        else:
            time_a = _time(a, calls)
            pairs.append((time_a, _time(b, calls)))
    return pairs


def temp_bytes(compiled: Compiled) -> int:
    """Return the temporary memory of a compiled function; 0 where XLA does not report it."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)


def matmul_rate(size: int = 2048) -> float:
    """Return the FLOP/s of one large float32 matmul on this device, the best of five.

    Args:
        size: the rows and columns of both factors.
    """
    x = jnp.ones((size, size), jnp.float32)
    multiply = _Calls(jax.jit(jnp.matmul).lower(x, x).compile(), (x, x), 0)
    _time(multiply, 1)
    return 2 * size**3 / min(_time(multiply, 1) for _ in range(5))


def _flops(compiled: Compiled) -> float | None:
    if " while(" in (compiled.as_text() or ""):
        return None
    return (compiled.cost_analysis() or {}).get("flops")


class _Calls:
    """A compiled function whose leading results are the leading arguments of its next call."""

    def __init__(self, compiled: Compiled, args: tuple[PyTree, ...], carried: int) -> None:
        self._compiled, self._carried = compiled, carried
        self._args = *jax.tree.map(jnp.copy, args[:carried]), *args[carried:]

    def __call__(self) -> PyTree:
        result = self._compiled(*self._args)
        if self._carried:
            self._args = *result[: self._carried], *self._args[self._carried :]
        return result


def _trace(make: Make, args: tuple[PyTree, ...], carried: int) -> tuple[float, Traced]:
    """Return the time to trace a new function, and the traced function."""
    function = jax.jit(make(), donate_argnums=tuple(range(carried)))
    start = time.perf_counter()
    traced = function.trace(*args)
    return time.perf_counter() - start, traced


def _compile(make: Make, args: tuple[PyTree, ...], carried: int) -> tuple[float, Compiled]:
    """Return the time to lower and compile a new function, and the compiled function."""
    _, traced = _trace(make, args, carried)
    start = time.perf_counter()
    compiled = traced.lower().compile()
    return time.perf_counter() - start, compiled


def _time(run: Callable[[], object], calls: int) -> float:
    """Return the mean time of a call, over the given number in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)  # pyright: ignore[reportPossiblyUnboundVariable]
    return (time.perf_counter() - start) / calls
