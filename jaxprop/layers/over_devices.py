"""Functions of examples and heads, mapped or split over devices without their kernels knowing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jaxprop.core.mesh import shard_map_axes


def spread(f: Callable[..., list[Array]], *args: Array | None, by_xla: bool) -> list[Array]:
    """Return f(*args), where ``jax.vmap`` adds examples, and devices split examples and heads.

    Args:
        f: a function of arrays whose first two axes are examples and heads, as are those of its
            results.
        args: its arguments; the first has all heads.
        by_xla: whether XLA may split them over devices.
    """

    @custom_vmap
    def run(*args: Array | None) -> list[Array]:
        return _partitioned(f, *args) if by_xla and not shard_map_axes() else f(*args)

    @run.def_vmap
    def _(size: int, batched: Sequence[Any], *args: Array | None) -> tuple[list[Array], list[bool]]:
        def folded(z: Array, is_batched: bool) -> Array:
            z = z if is_batched else jnp.broadcast_to(z, (size, *z.shape))
            return z.reshape(-1, *z.shape[2:])

        ys = run(*jax.tree.map(folded, args, tuple(batched)))
        return [y.reshape(size, -1, *y.shape[1:]) for y in ys], [True] * len(ys)

    return run(*args)


def _partitioned(f: Callable[..., list[Array]], *args: Any) -> list[Array]:
    """Return f(*args), where XLA may give each device its own examples and heads.

    An argument with fewer heads, each for a group of the first argument's heads, has them all on
    every device, which takes those of its own groups.
    """
    n, heads = args[0].shape[:2]
    groups = jax.tree.map(lambda z: heads // z.shape[1], args)
    whole: list[str] = []

    def alone() -> str:
        whole.append(f"x{len(whole)}")
        return whole[-1]

    def names(z: Any) -> str:
        of_heads = "h" if z.shape[1] == heads else alone()
        return " ".join(["n", of_heads, *(alone() for _ in z.shape[2:])])

    def of_own(at: Array, *args: Any) -> list[Array]:
        def own(z: Array, group: int) -> Array:
            return z[:, at[0] // group] if 1 < group < heads and at.shape[1] < heads else z

        return f(*jax.tree.map(own, args, groups))

    def partition(mesh: Any, given: Any, results: Any) -> Any:
        of_examples, of_heads = (_splits(mesh, given[1], axis) for axis in (0, 1))

        def placed(z: Any) -> NamedSharding:
            split = of_heads if z.shape[1] == heads else None
            return NamedSharding(mesh, PartitionSpec(of_examples, split))

        return mesh, of_own, *jax.tree.map(placed, (results, given))

    def results_of(*args: Any) -> Any:
        return partition(*args)[2]

    at = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int32), (n, heads))
    given = at, *args
    rule = [", ".join(map(names, jax.tree.leaves(z))) for z in (given, jax.eval_shape(f, *args))]
    by_device = custom_partitioning(of_own)
    by_device.def_partition(
        partition,
        results_of,
        decode_shardings=False,  # JAX cannot decode them all, and has no mesh for some
        sharding_rule=" -> ".join(rule),
        need_replication_factors=tuple(whole),
    )
    return by_device(*given)


def _splits(mesh: Any, x: Any, axis: int) -> tuple[str, ...]:
    """Return the mesh axes that split an axis of x, or none where one of them splits it in part."""
    if mesh.empty:
        return ()
    start = {at: z[axis].start or 0 for at, z in x.sharding.devices_indices_map(x.shape).items()}
    starts = np.vectorize(start.get, [int])(mesh.devices)
    along = [np.ptp(starts, i).any() for i in range(starts.ndim)]
    names = tuple(itertools.compress(mesh.axis_names, along))
    parts = math.prod(mesh.shape[name] for name in names)
    return names if parts == x.shape[axis] // x.sharding.shard_shape(x.shape)[axis] else ()
