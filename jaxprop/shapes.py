"""What an argument is like: its kind, its shapes, in words and as structs, and where it lies."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def shapes(tree: Any) -> str:
    """The tree with each array written as its dtype and shape, ``float32[8,2]``."""

    class Shape(str):
        __repr__ = str.__str__

    def short(leaf: Any) -> Shape:
        if not hasattr(leaf, "dtype"):
            return Shape(f"{type(leaf).__name__} {leaf!r}")
        return Shape(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return repr(jax.tree.map(short, tree))


def require(value: object, kind: type, where: str) -> None:
    """Raise ``TypeError`` unless value is an instance of kind, with the usual slips named."""
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{where} is the class {value.__name__}; write {value.__name__}(...)")
    if not isinstance(value, kind):
        raise TypeError(f"{where} is not a {kind.__name__} but {value!r}")


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> None:
    """Raise unless value is a whole number of at least 1."""
    if not is_whole(value):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is at least 1, not {value}")


def laid_out(x: jax.Array, *axes: Any) -> NamedSharding | None:
    """Where an array shall lie whose axes lie as named, on x's mesh if that has explicit axes.

    Elsewhere XLA finds out by itself, and the answer is None.
    """
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, PartitionSpec(*axes))


def shard_map_axes() -> tuple[str, ...]:
    """The mesh axes along which, in ``jax.shard_map``, each device sees its own share alone."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, of_type in types if of_type == AxisType.Manual)


def empty_like(x: jax.Array) -> jax.Array:
    """An array without elements that remembers x's shape, (N, 0, *shape[1:]), and its dtype."""
    return jax.lax.slice_in_dim(jnp.expand_dims(x, 1), 0, 0, axis=1)


def structs(x: Any) -> Any:
    """x as ``jax.ShapeDtypeStruct``, in the dtypes that JAX would give it."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"x must be an array, not {shapes(x)}")
        numpy = isinstance(leaf, np.ndarray)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if numpy else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(struct, x)
