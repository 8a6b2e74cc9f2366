"""The measurements of ``jaxprop bench``: the hand-written chain against JAX's autodiff."""

from jaxprop.bench.report import BenchError, bench, regressions

__all__ = ["BenchError", "bench", "regressions"]
