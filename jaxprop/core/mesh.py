"""Where an array lies on a mesh of devices, as far as a layer or a form must say it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def is_explicit(x: Array) -> bool:
    """Return whether x lies on a mesh with Explicit axes, where each array's type says how."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def laid_out(x: Array, *axes: str | tuple[str, ...] | None) -> NamedSharding | None:
    """Return the sharding of an array over these axes of x's mesh, or None without Explicit axes.

    Args:
        x: an array on the mesh.
        axes: for each axis of the new array, the mesh axes that split it.
    """
    if not is_explicit(x):
        return None
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*axes))


def shard_map_axes() -> tuple[str, ...]:
    """Return the mesh axes of the ``jax.shard_map`` that is being traced, along which a device
    sees its own share alone."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, of_type in types if of_type == AxisType.Manual)


def like(primal: Array, cotangent: Array) -> Array:
    """Return the cotangent in its primal's dtype and, under ``jax.shard_map``, where its primal is.

    There a param that is the same on all devices meets another share of the batch on each. Its
    cotangent is the sum over them, which is JAX's own rule for using the one beside the other.
    """
    if shard_map_axes():
        beside = jnp.zeros_like(cotangent)
        _, pull = jax.vjp(lambda primal: primal.astype(cotangent.dtype) + beside, primal)
        return pull(cotangent)[0]
    return cotangent.astype(jnp.result_type(primal))
