"""The measurements of ``jaxprop bench``: the hand-written chain against JAX's autodiff."""

from jaxprop.bench.growth.report import bench_growth
from jaxprop.bench.peers.report import bench_peers
from jaxprop.bench.report import BenchError, bench, regressions
from jaxprop.bench.target import TARGETS, target_devices
from jaxprop.bench.target_report import bench_target

__all__ = [
    "TARGETS",
    "BenchError",
    "bench",
    "bench_growth",
    "bench_peers",
    "bench_target",
    "regressions",
    "target_devices",
]
