"""The checks around a layer's own ``init``, ``forward`` and ``backward``, whoever calls them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import on_device
from jaxprop.core.checks import check_key
from jaxprop.core.describe import is_array, shapes, structs
from jaxprop.core.tree import arrays, bare
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals

if TYPE_CHECKING:
    from jaxprop.core.layer import Layer


def check_params(layer: Layer, params: Params, x: PyTree) -> None:
    """Raise ``ValueError`` unless params have the structure and shapes that ``init`` makes."""
    expected = _expected(layer, x)
    leaves, structure = jax.tree.flatten(params)
    if structure != expected.structure:
        leaves, structure = jax.tree.flatten(bare(params))
    if structure != expected.structure:
        hint = " (does it define init?)" if expected.params == () else ""
        raise ValueError(
            f"{layer}: params are {shapes(params)}, "
            f"but an input {shapes(x)} takes {shapes(expected.params)}{hint}"
        )
    for (path, want), got in zip(expected.leaves, leaves, strict=True):
        if getattr(got, "shape", None) != want and jnp.shape(got) != want:
            raise ValueError(
                f"{layer}: params{jax.tree_util.keystr(path)} has shape {jnp.shape(got)}, "
                f"but an input {shapes(x)} takes {want}"
            )


def held_to_init(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def held(self: Layer, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        self.check_params(params, x)
        x = x if isinstance(x, Array) else jax.tree.map(on_device, x)
        if not self.hands_down_types:
            params = arrays(params)
        result = forward(self, params, x)
        pair = isinstance(result, tuple) and len(result) == 2
        if not pair or not jax.tree.leaves(result[0]) or not _of_arrays(result[0]):
            raise TypeError(f"{self}: forward returns {shapes(result)}, not (y, residuals)")
        return result

    return held


def held_to_pair(backward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def held(self: Layer, params: Params, residuals: Residuals, ct: Cotangent) -> Any:
        if not _of_arrays(ct):
            raise TypeError(f"{self}: backward takes ct as an array, not {shapes(ct)}")
        if not self.hands_down_types:
            params = arrays(params)
        try:
            result = backward(self, params, residuals, ct)
        except Exception as error:
            if not self.hands_down_types:
                error.add_note(f"in backward of {self}, of the ct {shapes(ct)}")
            raise
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{self}: backward returns {shapes(result)}, not (d_params, d_x)")
        return result

    return held


def held_to_key(init: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init)
    def held(self: Layer, key: Array, x: PyTree) -> Any:
        check_key(f"{type(self).__name__}.init", key)
        return init(self, key, x)

    return held


def _of_arrays(tree: PyTree) -> bool:
    return all(map(is_array, jax.tree.leaves(tree)))


class _Expected(NamedTuple):
    """The params that ``init`` makes, without types: as structs, and as the facts to compare."""

    params: Params
    structure: Any
    leaves: tuple[tuple[Any, tuple[int, ...]], ...]


def _expected(layer: Layer, x: PyTree) -> _Expected:
    try:
        leaves, structure = jax.tree.flatten(structs(x))
    except TypeError as error:
        raise TypeError(f"{layer}: {error}") from None
    try:
        hash(layer)
    except TypeError:
        _refuse_fields(layer)
    return _init_shapes(layer, structure, tuple(leaves))


@functools.lru_cache(maxsize=1024)
def _init_shapes(layer: Layer, structure: Any, leaves: tuple[Any, ...]) -> _Expected:
    params = bare(
        jax.eval_shape(
            lambda *leaves: layer.init(jax.random.key(0), jax.tree.unflatten(structure, leaves)),
            *leaves,
        )
    )
    shaped = tuple((path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(params))
    return _Expected(params, jax.tree.structure(params), shaped)


def _refuse_fields(layer: Layer) -> None:
    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        value = getattr(layer, field.name)
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{type(layer).__name__}.{field.name} = {value!r} cannot be hashed; arrays live in "
                "params, and a list is written as a tuple"
            ) from None
