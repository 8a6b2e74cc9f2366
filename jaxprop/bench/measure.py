"""Measure a function A against a function B, in one process and in turn, on JAX's device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TRACES = 9


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


class Program(NamedTuple):
    """What one compiled function costs. Times in seconds, memory in bytes; flops for one call."""

    run: Spread
    trace: Spread
    compile: Spread
    temp_bytes: int
    flops: float


class Comparison(NamedTuple):
    """A beside B; each ratio is that of the pair's two neighbouring samples, A over B."""

    a: Program
    b: Program
    run: Spread
    trace: Spread
    compile: Spread
    temp: float | None


def compare(
    make_a: Callable[[], Callable[..., Any]],
    make_b: Callable[[], Callable[..., Any]],
    args: tuple[Any, ...],
    *,
    seconds: float,
    builds: int,
) -> Comparison:
    """Trace both in turn, compile both ``builds`` times in turn, then run both in turn.

    ``make_a`` and ``make_b`` return a new function each time, so that nothing is traced from a
    cache. Running goes on for about ``seconds``, and for at least three pairs.
    """
    makers = (make_a, make_b)
    traces = [[_trace(make, args)[0] for make in makers] for _ in range(TRACES + 1)][1:]
    built = [[_compile(make, args) for make in makers] for _ in range(builds + 1)][1:]
    (_, run_a), (_, run_b) = built[-1]
    calls = max(1, round(0.005 / max(min(_time(run_a, args, 1), _time(run_b, args, 1)), 1e-7)))
    pairs = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(pairs) < 3 or time.perf_counter() < end:
        if len(pairs) % 2:
            b = _time(run_b, args, calls)
            pairs.append((_time(run_a, args, calls), b))
        else:
            a = _time(run_a, args, calls)
            pairs.append((a, _time(run_b, args, calls)))

    def program(side: int) -> Program:
        compiled = built[-1][side][1]
        return Program(
            run=Spread.of([pair[side] for pair in pairs]),
            trace=Spread.of([trace[side] for trace in traces]),
            compile=Spread.of([build[side][0] for build in built]),
            temp_bytes=getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0),
            flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
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


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of one large float32 matmul on this device: the best of five."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    _time(multiply, (x, x), 1)
    return 2 * size**3 / min(_time(multiply, (x, x), 1) for _ in range(5))


def _trace(make: Callable[[], Callable[..., Any]], args: tuple[Any, ...]) -> tuple[float, Any]:
    function = jax.jit(make())
    start = time.perf_counter()
    traced = function.trace(*args)
    return time.perf_counter() - start, traced


def _compile(make: Callable[[], Callable[..., Any]], args: tuple[Any, ...]) -> tuple[float, Any]:
    _, traced = _trace(make, args)
    start = time.perf_counter()
    compiled = traced.lower().compile()
    return time.perf_counter() - start, compiled


def _time(function: Callable[..., Any], args: tuple[Any, ...], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*args)
    jax.block_until_ready(result)  # pyright: ignore[reportPossiblyUnboundVariable]
    return (time.perf_counter() - start) / calls
