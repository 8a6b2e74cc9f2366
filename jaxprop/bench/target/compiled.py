"""Programs compiled for a device that this machine lacks: compiled, and not run.

XLA's compilers for TPUs (libtpu) and for NVIDIA's GPUs (JAX's CUDA plugin) need no device. The
memory that they report is what such a device would allocate. Cycles are the TPU compiler's own
estimate, which is only good for comparing one program with another.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled

from jaxprop.bench.case import Case
from jaxprop.bench.measure import Make
from jaxprop.bench.target.hlo import Cost, cost
from jaxprop.core.types import PyTree

TPU = {  # keeps libtpu from looking for the machine that it runs on
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
TOPOLOGIES = {  # by the number of chips
    "v5e": {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"},
    "v5p": {1: "v5p:1x1x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "v6e": {1: "v6e:1x1", 4: "v6e:2x2", 8: "v6e:2x4"},
}
GPUS = 8  # in a node
TARGETS = (*TOPOLOGIES, "h100")


class Build(NamedTuple):
    """The cost of a program on a target, according to the target's compiler.

    Attributes:
        temp_bytes: its temporary memory.
        live_bytes: the most memory that is in use at once, less the arguments and the results.
        cost: its cycles and collectives; a GPU's compiler reports no cycles.
    """

    temp_bytes: int
    live_bytes: int
    cost: Cost


def target_devices(name: str, count: int = 1) -> list[Any]:
    """Return devices to compile for, as JAX describes devices that are not there.

    To place an argument on them, pass ``jax.ShapeDtypeStruct(shape, dtype, sharding=...)``.

    Args:
        name: "v5e", "v5p" or "v6e", Google's TPUs, with ``pip install 'jaxprop-vjp[tpu]'``; or
            "h100", NVIDIA's GPU, with ``'jaxprop-vjp[h100]'``.
        count: how many: 1, 4 or 8 TPUs; up to 8 GPUs, or any number of nodes of 8.

    Raises:
        ValueError: for another name or count.
        ImportError: if the extra is not installed.
        RuntimeError: for "h100" where JAX looked for a GPU and found no driver.
    """
    from jax.experimental import topologies

    if name not in TARGETS:
        raise ValueError(f"no target {name}; there are {', '.join(TARGETS)}")
    extra = "tpu" if name in TOPOLOGIES else "h100"
    module = "libtpu" if extra == "tpu" else "jax_plugins.xla_cuda12"
    if not _has(module):
        raise ImportError(f"needs its compiler: pip install 'jaxprop-vjp[{extra}]'")
    if extra == "h100":
        nodes = -(-count // GPUS)
        if count < 1 or (nodes > 1 and count % GPUS):
            raise ValueError(
                f"target h100 has up to {GPUS} devices or nodes of {GPUS}, not {count}"
            )
        described = (
            importlib.resources.files("jaxprop.bench.target").joinpath("h100.txtpb").read_text()
        )
        try:
            topology = topologies.get_topology_desc(
                platform="cuda",
                topology_name="h100",
                target_config=described,
                topology=f"1x{nodes}x{GPUS}",
            )
        except NotImplementedError as error:  # JAX found no driver, and did not load the plugin
            raise RuntimeError("without an NVIDIA driver, set JAX_PLATFORMS=cpu") from error
        return topology.devices[:count]
    if count not in TOPOLOGIES[name]:
        counts = ", ".join(map(str, TOPOLOGIES[name]))
        raise ValueError(f"target {name} has {counts} devices, not {count}")
    for variable, value in TPU.items():
        os.environ.setdefault(variable, value)
    options = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    topology = TOPOLOGIES[name][count]
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def built(case: Case, device: Any) -> tuple[Build, Build]:
    """Return the costs of both functions of a case on one device of a target."""
    args = placed(case.args, device)
    return _build(case.hand, args, case.carried), _build(case.auto, args, case.carried)


def placed(args: PyTree, device: Any) -> PyTree:
    """Return the arrays' shapes and dtypes, placed on a device that holds no arrays."""
    where = SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), args
    )


def build_of(compiled: Compiled) -> Build:
    """Return the cost of a compiled program."""
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Build(
        temp_bytes=memory.temp_size_in_bytes,
        live_bytes=max(memory.peak_memory_in_bytes - held, 0),
        cost=cost(compiled.as_text() or ""),
    )


def _build(make: Make, args: tuple[PyTree, ...], carried: int) -> Build:
    function = jax.jit(make(), donate_argnums=tuple(range(carried)))
    return build_of(function.lower(*args).compile())


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that contains it is missing, too
        return False
