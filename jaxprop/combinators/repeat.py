"""A stack of layers of one kind as one scan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.checks import check_count, require
from jaxprop.core.child import Child
from jaxprop.core.combinator import Combinator, in_layer, over_layers
from jaxprop.core.describe import shapes, structs
from jaxprop.core.layer import Layer
from jaxprop.core.residuals import Distinct
from jaxprop.core.step import Replacing, Visit, params_of
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Repeat(Combinator):
    """``times`` layers of one kind, each with its own params, as a ``lax.scan`` over the stack.

    Forward, y is the scan's carry and residuals are its stacked outputs. The chain rule is the scan
    in reverse, with ct as its carry. A visit runs inside, at each layer, and only its results are
    stacked, except that a ``Total`` is added up; a form becomes a ``Repeated`` form.

    Attributes:
        layer: the layer.
        times: how often it runs.
    """

    layer: Layer
    times: int

    def __post_init__(self) -> None:
        require(self.layer, Layer, "repeat: the layer")
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
            return y, Distinct.of(residuals, jax.tree.leaves(params), x, y)

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
            saved = here.tree(_leaves(params, visit), kept.before(index, first))
            visited, d_x = self.layer.walk(params, saved, ct, visit)
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

        If a scan's step reads a layer of a stack and then writes the same layer, the compiled
        program may copy the whole stack in each step. So one layer is held from step to step. On a
        CPU it is a new one, which is written one step late, just before the next layer is read.
        Elsewhere it is an old one, which is read one step early, just after the new one of the step
        before is written. No read then has to come before a write, and each compiler makes one copy
        less than in the other order.
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

        def written_late(stack: PyTree, held: PyTree, index: Any) -> tuple[PyTree, PyTree]:
            stack = write(stack, held, jnp.minimum(index + 1, self.times - 1))
            return stack, read(stack, jnp.maximum(index, 0))

        def read_early(stack: PyTree, new: PyTree, index: Any) -> tuple[PyTree, PyTree]:
            stack = write(stack, new, index)
            return stack, read(stack, jnp.maximum(index - 1, 0))

        def as_it_is(stack: PyTree, held: PyTree, index: Any) -> tuple[PyTree, PyTree]:
            return stack, held

        platform_dependent = jax.lax.platform_dependent
        kept, first = residuals

        def back(carry: Any, step: tuple[Array, Distinct]) -> tuple[Any, None]:
            (stack, held, ct), (index, here) = carry, step
            stack, layer = platform_dependent(
                stack, held, index, cpu=written_late, default=as_it_is
            )
            saved = here.tree(_leaves(layer, visit), kept.before(index, first))
            new, d_x = self.layer.walk(layer, saved, ct, visit)
            self._check_d_x(ct, d_x)
            stack, held = platform_dependent(stack, new, index, cpu=as_it_is, default=read_early)
            return (stack, held, d_x), None

        carry = places, read(places, self.times - 1), ct
        steps = jnp.arange(self.times), kept
        with in_layer(0, self.layer):
            (stack, held, d_x), _ = jax.lax.scan(back, carry, steps, reverse=True)
        stack, _ = platform_dependent(stack, held, -1, cpu=written_late, default=as_it_is)
        return stack, d_x

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


def _leaves(place: PyTree, visit: Visit) -> list[Array]:
    return jax.tree.leaves(params_of(place, visit))


def repeat(layer: Layer, times: int) -> Repeat:
    """Return ``times`` copies of the layer one after the other, each with its own params.

    Each leaf of params is the stack (times, ...) of the layers' leaves. The layers run as one scan:
    the program is compiled for one layer, whatever the depth.

    Args:
        layer: a layer that keeps the shape and dtype of x; others raise ``ValueError``.
        times: the number of layers, at least 1.

    Raises:
        TypeError: for a ``layer`` that is not a layer, or ``times`` that is not a whole number.
        ValueError: for ``times`` below 1.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 12)
        >>> net.init(jax.random.key(0), jnp.ones((2, 4)))[0].w.shape
        (12, 4, 4)
    """
    return Repeat(layer, times)
