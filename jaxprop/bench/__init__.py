"""The measurements of ``jaxprop bench``: the hand-written chain rule against JAX's autodiff."""

from jaxprop.bench.growth.report import bench_growth
from jaxprop.bench.peers.report import bench_peers
from jaxprop.bench.report import bench, regressions
from jaxprop.bench.target.compiled import TARGETS, target_devices
from jaxprop.bench.target.report import bench_target
from jaxprop.bench.terminal import BenchError

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
