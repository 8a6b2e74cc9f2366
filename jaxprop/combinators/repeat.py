"""A stack of equal layers as one scan."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.checks import check_count, require
from jaxprop.core.child import Child
from jaxprop.core.combinator import Combinator, in_layer, over_layers
from jaxprop.core.describe import shapes, structs
from jaxprop.core.layer import Layer
from jaxprop.core.residuals import OfLayers, residual_axes
from jaxprop.core.step import Replacing, Visit
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Repeat(Combinator):
    """``times`` layers of one kind, each with params of its own, as a ``lax.scan`` over the stack.

    Forward, (y, residuals) is what a scan calls (carry, ys); the chain rule is the scan in reverse,
    whose carry is ct. A visit is paid inside, at each layer, and only its result is stacked: a
    ``Total`` is added up, and a form becomes a ``Repeated`` one.

    Attributes:
        layer: the layer.
        times: how often it runs.
    """

    layer: Layer
    times: int

    def __post_init__(self) -> None:
        require(self.layer, Layer, "repeat")
        check_count("repeat: times", self.times)

    def __repr__(self) -> str:
        return f"repeat({self.layer!r}, {self.times})"

    def children(self) -> tuple[Child, ...]:
        return (Child(self.layer, None, self.times),)

    def init(self, key: Array, x: PyTree) -> Params:
        return self.init_with_output(key, x)[0]

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        def one(key: Array) -> Params:
            params, y = self.layer.init_with_output(key, structs(x))
            self._check_output(structs(x), y)
            return params

        return jax.vmap(one)(jax.random.split(key, self.times)), structs(x)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        def ahead(x: PyTree, params: Params) -> tuple[PyTree, Distinct]:
            y, residuals = self.layer.forward(params, x)
            self._check_output(x, y)
            return y, Distinct.of(residuals, x, y)

        with in_layer(0, self.layer):
            y, kept = jax.lax.scan(ahead, x, params, length=self.times)
        return y, (kept, () if kept.y is None else x)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        if isinstance(visit, Replacing):
            return self._walk_in_place(place, residuals, ct, visit)

        kept, first = residuals

        def back(ct: Cotangent, step: tuple[Array, Params, Distinct]) -> tuple[Cotangent, Visited]:
            index, params, here = step
            visited, d_x = self.layer.walk(params, here.tree(kept.before(index, first)), ct, visit)
            self._check_d_x(ct, d_x)
            return d_x, visited

        steps = jnp.arange(self.times), place, kept
        with in_layer(0, self.layer):
            d_x, visited = jax.lax.scan(back, ct, steps, reverse=True)
        return over_layers(visited), d_x

    def _walk_in_place(
        self, places: PyTree, residuals: Residuals, ct: Cotangent, visit: Replacing
    ) -> tuple[PyTree, Cotangent]:
        """Replace the place of each layer in the memory of the stacks.

        A scan whose step reads a layer and writes the same one is compiled into a copy of the whole
        stack a step. So the new place of layer i + 1 is written one step late, just before layer i
        is read: no read then follows the write that it would have to come before.
        """

        def read(stack: PyTree, index: Any) -> PyTree:
            return jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
            )

        def write(stack: PyTree, place: PyTree, index: Any) -> PyTree:
            return jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0),
                stack,
                place,
            )

        kept, first = residuals

        def back(carry: Any, step: tuple[Array, Distinct]) -> tuple[Any, None]:
            (stack, late, ct), (index, here) = carry, step
            stack = write(stack, late, jnp.minimum(index + 1, self.times - 1))
            saved = here.tree(kept.before(index, first))
            late, d_x = self.layer.walk(read(stack, index), saved, ct, visit)
            self._check_d_x(ct, d_x)
            return (stack, late, d_x), None

        carry = places, read(places, self.times - 1), ct
        steps = jnp.arange(self.times), kept
        with in_layer(0, self.layer):
            (stack, late, d_x), _ = jax.lax.scan(back, carry, steps, reverse=True)
        return write(stack, late, 0), d_x

    def _check_output(self, x: PyTree, y: PyTree) -> None:
        if shapes(y) != shapes(x):
            same = getattr(y, "shape", None) == getattr(x, "shape", ())
            hint = " (one that is cast takes x.astype(dtype))" if same else ""
            raise ValueError(
                f"{self}: the layer turns {shapes(x)} into {shapes(y)}, but its y is the x of "
                f"the next{hint}"
            )

    def _check_d_x(self, ct: Cotangent, d_x: Cotangent) -> None:
        if shapes(d_x) != shapes(ct):
            raise ValueError(
                f"{self}: backward of the layer returns {shapes(d_x)} for its d_x, but its x is "
                f"{shapes(ct)}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distinct(OfLayers):
    """The residuals of a layer, or of a stack of them, each array once.

    Two parts of a layer often save the same array. And where it saves its x and its y, its x is the
    y of the layer before: then only y is kept.

    Attributes:
        leaves: the arrays that are kept.
        places: for each leaf of the residuals, which of them it is; -1 for an x that is not kept.
        structure: that of the residuals.
        y: which of them is y, where x is not kept; else None.
        axes: for each leaf, the axis of the examples in the residuals of one layer.
    """

    leaves: tuple[Array, ...]
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})
    y: int | None = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, residuals: Residuals, x: PyTree, y: PyTree) -> Distinct:
        """Return the residuals that a layer saved on the way from x to y."""
        leaves, structure = jax.tree.flatten(residuals)
        distinct = {id(leaf): leaf for leaf in leaves}
        twice = x is not y and id(x) in distinct and id(y) in distinct
        if twice:
            del distinct[id(x)]
        place = {key: index for index, key in enumerate(distinct)}
        places = tuple(place.get(id(leaf), -1) for leaf in leaves)
        where = dict(zip(map(id, leaves), jax.tree.leaves(residual_axes(residuals)), strict=True))
        axes = tuple(where[key] for key in distinct)
        of_y = place[id(y)] if twice else None
        return cls(tuple(distinct.values()), places, structure, of_y, axes)

    def axes_of_examples(self) -> Distinct:
        return dataclasses.replace(self, leaves=tuple(axis + 1 for axis in self.axes))

    def before(self, index: Array, first: PyTree) -> PyTree:
        """Return the x of one layer of a stack, the y of the layer before, where it is not kept.

        Args:
            index: which layer.
            first: the x of the first one.
        """
        if self.y is None:
            return ()
        ys = self.leaves[self.y]
        y = jax.lax.dynamic_index_in_dim(ys, jnp.maximum(index - 1, 0), keepdims=False)
        return jnp.where(index == 0, first, y)

    def tree(self, x: PyTree) -> Residuals:
        """Return the residuals of a layer whose input was x."""
        leaves = *self.leaves, x
        return jax.tree.unflatten(self.structure, [leaves[place] for place in self.places])


def repeat(layer: Layer, times: int) -> Repeat:
    """Return ``times`` copies of the layer one after the other, each with its own params.

    Each leaf of params is the stack (times, ...) of the layers' leaves. They run as one scan: the
    program is compiled for one layer, whatever the depth.

    Args:
        layer: a layer that keeps the shape and dtype of x; others raise ``ValueError``.
        times: how many of them, at least 1.

    Raises:
        TypeError: for what is not a layer, or not a whole number.
        ValueError: for a number below 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 12)
        >>> net.init(jax.random.key(0), jnp.ones((2, 4)))[0].w.shape
        (12, 4, 4)
    """
    return Repeat(layer, times)
