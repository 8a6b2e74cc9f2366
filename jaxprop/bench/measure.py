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
    """What one compiled function costs. Times in seconds, memory in bytes.

    ``flops`` are those of one call, None where a loop hides how often its body runs.
    """

    run: Spread
    trace: Spread
    compile: Spread
    temp_bytes: int
    flops: float | None


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
    carried: int = 0,
    seconds: float,
    builds: int,
) -> Comparison:
    """Trace both in turn, compile both ``builds`` times in turn, then run both in turn.

    ``make_a`` and ``make_b`` return a new function each time, so that nothing is traced from a
    cache. Running goes on for about ``seconds``, and for at least three pairs. The first
    ``carried`` args are donated, and the first results stand for them in the next call.
    """
    makers = (make_a, make_b)
    traces = [[_trace(make, args, carried)[0] for make in makers] for _ in range(TRACES + 1)][1:]
    built = [[_compile(make, args, carried) for make in makers] for _ in range(builds + 1)][1:]
    run_a, run_b = (_Calls(compiled, args, carried) for _, compiled in built[-1])
    calls = max(1, round(0.005 / max(min(_time(run_a, 1), _time(run_b, 1)), 1e-7)))
    pairs = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(pairs) < 3 or time.perf_counter() < end:
        if len(pairs) % 2:
            b = _time(run_b, calls)
            pairs.append((_time(run_a, calls), b))
        else:
            a = _time(run_a, calls)
            pairs.append((a, _time(run_b, calls)))

    def program(side: int) -> Program:
        compiled = built[-1][side][1]
        return Program(
            run=Spread.of([pair[side] for pair in pairs]),
            trace=Spread.of([trace[side] for trace in traces]),
            compile=Spread.of([build[side][0] for build in built]),
            temp_bytes=getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0),
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


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of one large float32 matmul on this device: the best of five."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = _Calls(jax.jit(jnp.matmul).lower(x, x).compile(), (x, x), 0)
    _time(multiply, 1)
    return 2 * size**3 / min(_time(multiply, 1) for _ in range(5))


def _flops(compiled: Any) -> float | None:
    return None if " while(" in compiled.as_text() else compiled.cost_analysis().get("flops")


class _Calls:
    """Calls of a compiled function, each with the first results of the one before."""

    def __init__(self, compiled: Callable[..., Any], args: tuple[Any, ...], carried: int) -> None:
        self._compiled, self._carried = compiled, carried
        self._args = *jax.tree.map(jnp.copy, args[:carried]), *args[carried:]

    def __call__(self) -> Any:
        result = self._compiled(*self._args)
        if self._carried:
            self._args = *result[: self._carried], *self._args[self._carried :]
        return result


def _trace(
    make: Callable[[], Callable[..., Any]], args: tuple[Any, ...], carried: int
) -> tuple[float, Any]:
    function = jax.jit(make(), donate_argnums=tuple(range(carried)))
    start = time.perf_counter()
    traced = function.trace(*args)
    return time.perf_counter() - start, traced


def _compile(
    make: Callable[[], Callable[..., Any]], args: tuple[Any, ...], carried: int
) -> tuple[float, Any]:
    _, traced = _trace(make, args, carried)
    start = time.perf_counter()
    compiled = traced.lower().compile()
    return time.perf_counter() - start, compiled


def _time(run: _Calls, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)  # pyright: ignore[reportPossiblyUnboundVariable]
    return (time.perf_counter() - start) / calls
