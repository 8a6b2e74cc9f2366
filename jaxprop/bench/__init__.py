"""The measurements behind every claim of speed: ``jaxprop bench``."""

from jaxprop.bench.report import BenchError, bench, regressions

__all__ = ["BenchError", "bench", "regressions"]
