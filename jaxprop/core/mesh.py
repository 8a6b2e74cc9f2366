"""The layout of arrays on a mesh of devices, where a layer or a form must specify it."""

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
    """Return whether x is on a mesh with Explicit axes, where an array's type has its sharding."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def devices_by_xla(x: Array) -> int:
    """Return the number of devices that XLA may split x over, those of its mesh's Auto axes."""
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
    """Return f(*args) on a mesh of Explicit axes, with the arrays inside f laid out by XLA.

    Args:
        f: a function of trees of arrays. It is traced once more for the shapes of its result.
        specs: a function of that result, with a ``jax.ShapeDtypeStruct`` for each array, that
            returns a ``PartitionSpec`` for each.
        args: the arguments; at least one array in them is on such a mesh.
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
    """Return the mesh axes of the ``jax.shard_map`` that is being traced.

    Along them a device sees only its own share of the arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, of_type in types if of_type == AxisType.Manual)


def split_over(x: Array) -> tuple[str, ...]:
    """Return the mesh axes of a ``jax.shard_map`` along which devices hold different parts of x.

    If JAX does not track them (``check_vma=False``), these are all of its axes.
    """
    axes = shard_map_axes()
    if not axes or not _varying(jax.lax.axis_index(axes)):
        return axes
    return tuple(axis for axis in axes if axis in _varying(x))


def _varying(x: Array) -> frozenset[str]:
    """Return the axes along which x is known to differ between devices; newer JAX renamed them."""
    of_x: Any = jax.typeof(x)
    return of_x.manual_axis_type.varying if hasattr(of_x, "manual_axis_type") else of_x.vma


def varying_struct(
    arrays: Sequence[Array], shape: Sequence[int], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Return the struct of a result of arrays; in ``jax.shard_map`` it varies along their axes."""
    if not shard_map_axes():
        return jax.ShapeDtypeStruct(shape, dtype)
    varying = frozenset[str]().union(*map(_varying, arrays))
    if hasattr(jax.sharding, "ManualAxisType"):
        of_axes: Any = {"manual_axis_type": jax.sharding.ManualAxisType(varying=varying)}
    else:
        of_axes = {"vma": varying}
    return jax.ShapeDtypeStruct(shape, dtype, **of_axes)


def is_bound(axis: str) -> bool:
    """Return whether a ``jax.shard_map`` or a ``jax.vmap`` binds an axis of this name."""
    try:
        jax.lax.axis_index(axis)
    except NameError:
        return False
    return True


def varying_zero(arrays: Sequence[Array], dtype: DTypeLike) -> Array:
    """Return a zero; in ``jax.shard_map`` its type varies along the axes of the arrays' types.

    There the cotangent of a value that is the same on all devices is summed over them, which must
    not happen to the cotangent of an example's own zero.
    """
    zero = jnp.zeros((), dtype)
    if shard_map_axes():
        for array in arrays:
            if not jnp.issubdtype(array.dtype, jax.dtypes.extended):
                zero += jnp.zeros_like(array.ravel()[:1].sum(), dtype)
    return zero


def like(primal: Array, cotangent: Array) -> Array:
    """Return the cotangent in its primal's dtype and, under ``jax.shard_map``, laid out like it.

    There a param that is the same on all devices meets another share of the batch on each. Its
    cotangent is the sum over devices, by JAX's own rule for adding a share to such a param.
    """
    if shard_map_axes():
        beside = jnp.zeros_like(cotangent)
        _, pull = jax.vjp(lambda primal: primal.astype(cotangent.dtype) + beside, primal)
        return pull(cotangent)[0]
    return cotangent.astype(jnp.result_type(primal))
