"""The arguments of a checked function, by name, split into floating leaves and all the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.core.arrays import is_floating
from jaxprop.core.describe import shapes
from jaxprop.core.types import PyTree

Point = dict[str, Array]
"""The floating leaves of a function's arguments, by name, such as ``params['w']``."""


class Arguments(NamedTuple):
    """A function's arguments, each with its name.

    Attributes:
        names: their names.
        values: their values, with floats as arrays.
        held: the indices of those that JAX does not differentiate (``nondiff_argnums``).
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]
    held: frozenset[int]

    @classmethod
    def of(cls, f: Callable[..., Any], args: Sequence[Any], nondiff: Sequence[int]) -> Arguments:
        """Return the arguments that f is called with.

        Raises:
            TypeError: if f does not take them, and for complex numbers.
            ValueError: for a float that is not finite.
        """
        held = frozenset(index % len(args) for index in nondiff if args)
        names = names_of(f, args)
        values = tuple(
            arg if index in held else _with_arrays(name, arg)
            for index, (name, arg) in enumerate(zip(names, args, strict=True))
        )
        return cls(names, values, held)

    def point(self) -> Point:
        """Return the floating leaves, by name."""
        return {
            f"{name}{keystr(path)}": leaf
            for index, (name, value) in enumerate(zip(self.names, self.values, strict=True))
            for path, leaf in jax.tree.leaves_with_path(value)
            if index not in self.held and is_floating(leaf)
        }

    def at(self, point: Point) -> tuple[Any, ...]:
        """Return the arguments with the floating leaves of a point."""
        return tuple(
            value
            if index in self.held
            else jax.tree.map_with_path(
                lambda path, leaf, name=name: point.get(f"{name}{keystr(path)}", leaf), value
            )
            for index, (name, value) in enumerate(zip(self.names, self.values, strict=True))
        )


def names_of(f: Callable[..., Any], args: Sequence[Any]) -> tuple[str, ...]:
    """Return the name of each argument: its parameter's, or one like ``args[0]`` without a name."""
    try:
        signature = inspect.signature(f)
    except ValueError:  # a function written in C has no signature
        return tuple(f"args[{index}]" for index in range(len(args)))
    names: list[str] = []
    for name, value in signature.bind(*args).arguments.items():
        several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}[{index}]" for index in range(len(value))] if several else [name]
    return tuple(names)


def widened(point: Point) -> Point:
    """Return the point in float64."""
    return {name: jax.device_put(np.asarray(leaf, np.float64)) for name, leaf in point.items()}


def _with_arrays(name: str, arg: PyTree) -> PyTree:
    """Return an argument with its floats as JAX arrays."""
    return jax.tree.map_with_path(lambda path, leaf: _given(f"{name}{keystr(path)}", leaf), arg)


def _given(name: str, leaf: PyTree) -> PyTree:
    """Return a leaf, with a Python float as an array; raise for one that cannot be checked."""
    if isinstance(leaf, float):
        leaf = jnp.asarray(leaf)
    dtype = getattr(leaf, "dtype", None)
    if isinstance(leaf, complex) or (dtype and jnp.issubdtype(dtype, jnp.complexfloating)):
        raise TypeError(f"check_vjp: {name} is {shapes(leaf)}; it takes real floats")
    if not is_floating(leaf):
        return leaf
    if not np.isfinite(np.asarray(leaf, np.float64)).all():
        raise ValueError(f"check_vjp: {name} is not finite")
    return jnp.asarray(leaf)
