"""The layout of arrays on a mesh of devices, as far as a layer or a form must say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxprop.core.describe import structs
from jaxprop.core.types import PyTree

T = TypeVar("T")


def is_explicit(x: Array) -> bool:
    """Return whether x lies on a mesh with Explicit axes, where each array's type says how."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def devices_by_xla(x: Array) -> int:
    """Return over how many devices XLA may split x, those of its mesh's Auto axes."""
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return math.prod(mesh.shape[name] for name, of_type in axes if of_type == AxisType.Auto)


def laid_out(x: Array, *axes: str | tuple[str, ...] | None) -> NamedSharding | None:
    """Return the sharding of an array over these axes of x's mesh, or None without Explicit axes.

    Args:
        x: an array on the mesh.
        axes: for each axis of the new array, the mesh axes that split it.
    """
    if not is_explicit(x):
        return None
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*axes))


def by_xla(f: Callable[..., T], specs: Callable[[T], PyTree], *args: PyTree) -> T:
    """Return f(*args) on a mesh of Explicit axes, with all arrays within f where XLA wants them.

    Args:
        f: a function of trees of arrays. It is traced once more for the shapes of its result.
        specs: a function of that result, with a ``jax.ShapeDtypeStruct`` for each array, that
            returns a ``PartitionSpec`` for each.
        args: the arguments, one of them at least with an array on such a mesh.
    """
    leaves, structure = jax.tree.flatten(args)
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]

    def of_arrays(*arrays: Array) -> T:
        each = iter(arrays)
        given = [next(each) if hasattr(leaf, "dtype") else leaf for leaf in leaves]
        return f(*jax.tree.unflatten(structure, given))

    mesh = jax.typeof(next(filter(is_explicit, arrays))).sharding.mesh
    out = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs(jax.eval_shape(of_arrays, *structs(arrays))),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    automatic: Any = jax.sharding.auto_axes(of_arrays, out_sharding=out)
    return automatic(*arrays)


def shard_map_axes() -> tuple[str, ...]:
    """Return the mesh axes of the ``jax.shard_map`` that is being traced, along which a device
    sees its own share alone."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, of_type in types if of_type == AxisType.Manual)


def split_over(x: Array) -> tuple[str, ...]:
    """Return the mesh axes of a ``jax.shard_map`` along which each device has another part of x.

    Where it keeps no account of that (``check_vma=False``) they are all of its axes.
    """
    axes = shard_map_axes()
    if not axes or not _varying(jax.lax.axis_index(axes)):
        return axes
    return tuple(axis for axis in axes if axis in _varying(x))


def _varying(x: Array) -> frozenset[str]:
    """Return the axes along which devices are known to differ in x; newer JAX has another name."""
    of_x: Any = jax.typeof(x)
    return of_x.manual_axis_type.varying if hasattr(of_x, "manual_axis_type") else of_x.vma


def struct_beside(
    arrays: Sequence[Array], shape: Sequence[int], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Return the struct of a result of arrays, in ``jax.shard_map`` of a type like theirs."""
    if not shard_map_axes():
        return jax.ShapeDtypeStruct(shape, dtype)
    varying = frozenset[str]().union(*map(_varying, arrays))
    if hasattr(jax.sharding, "ManualAxisType"):
        of_axes: Any = {"manual_axis_type": jax.sharding.ManualAxisType(varying=varying)}
    else:
        of_axes = {"vma": varying}
    return jax.ShapeDtypeStruct(shape, dtype, **of_axes)


def is_bound(axis: str) -> bool:
    """Return whether an axis of this name is there, of a ``jax.shard_map`` or a ``jax.vmap``."""
    try:
        jax.lax.axis_index(axis)
    except NameError:
        return False
    return True


def zero_beside(arrays: Sequence[Array], dtype: DTypeLike) -> Array:
    """Return a zero, in ``jax.shard_map`` of a type that differs where that of an array does.

    There a cotangent of what is the same on all devices is a sum over them, which that of an
    example's own zero must not be.
    """
    zero = jnp.zeros((), dtype)
    if shard_map_axes():
        for array in arrays:
            if not jnp.issubdtype(array.dtype, jax.dtypes.extended):
                zero += jnp.zeros_like(array.ravel()[:1].sum(), dtype)
    return zero


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
