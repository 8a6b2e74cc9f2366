"""A stack of equal layers as one scan."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxprop.factored import over_layers
from jaxprop.layer import Combinator, Layer, Leave, Total, in_layer
from jaxprop.seats import bare, is_attached
from jaxprop.shapes import check_count, require, shapes


class Repeat(Combinator):
    """``times`` layers of one kind, each with params of its own, as a ``lax.scan`` over the stack.

    Forward, (y, residuals) is what a scan calls (carry, ys); the chain rule is the scan in reverse,
    whose carry is ct. What ``leave`` takes is taken inside, at each layer, and only that is
    stacked: ``Total`` is added up, and a form becomes a ``Repeated`` one.
    """

    layer: Layer
    times: int

    def __post_init__(self) -> None:
        require(self.layer, Layer, "repeat")
        check_count("repeat: times", self.times)

    def __repr__(self) -> str:
        return f"repeat({self.layer!r}, {self.times})"

    def init(self, key: chex.PRNGKey, x: Any) -> Any:
        return jax.vmap(lambda key: self.layer.init(key, x))(jax.random.split(key, self.times))

    def check_params(self, params: Any, x: Any) -> None:
        """Only the stack: each layer holds its own params to its own ``init``."""
        for path, node in jax.tree.leaves_with_path(params, is_leaf=is_attached):
            name = f"params{jax.tree_util.keystr(path)}"
            for leaf in jax.tree.leaves(bare(node)):
                if jnp.shape(leaf)[:1] != (self.times,):
                    raise ValueError(
                        f"{self}: {name} has shape {jnp.shape(leaf)}, but axis 0 is the layer, "
                        f"and there are {self.times}"
                    )
            for leaf in jax.tree.leaves(node):
                if jnp.shape(leaf)[:1] != (self.times,):
                    raise ValueError(
                        f"{self}: the optimizer has one state {jnp.shape(leaf)} for the whole "
                        f"stack {name}, not one for each layer; use fused=False"
                    )

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        def ahead(x: Any, params: Any) -> tuple[Any, Any]:
            y, residuals = self.layer.forward(params, x)
            if shapes(y) != shapes(x):
                hint = " (one that is cast takes x.astype(dtype))" if y.shape == x.shape else ""
                raise ValueError(
                    f"{self}: the layer turns {shapes(x)} into {shapes(y)}, but its y is the x of "
                    f"the next{hint}"
                )
            return y, Distinct.of(residuals, x, y)

        with in_layer(0, self.layer):
            y, kept = jax.lax.scan(ahead, x, params, length=self.times)
        return y, (kept, () if kept.carried is None else x)

    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        if any(map(is_attached, jax.tree.leaves(params, is_leaf=is_attached))):
            return self._walk_in_place(params, residuals, ct, leave)

        kept, first = residuals

        def back(ct: Any, step: tuple[Any, Any, Distinct]) -> tuple[Any, Any]:
            index, params, here = step
            left, d_x = self.layer.walk(params, here.tree(kept.before(index, first)), ct, leave)
            return d_x, left

        steps = jnp.arange(self.times), params, kept
        with in_layer(0, self.layer):
            d_x, left = jax.lax.scan(back, ct, steps, reverse=True)
        return over_layers(_added_up(left)), d_x

    def _walk_in_place(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        """Replace each layer's params by what is left in their place, in the memory of the stack.

        A scan whose step reads a layer and writes the same one is compiled into a copy of the whole
        stack a step. So what is left of layer i + 1 is written one step late, just before layer i
        is read: no read then follows the write that it would have to come before.
        """

        def read(stack: Any, index: Any) -> Any:
            return jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
            )

        def write(stack: Any, layer: Any, index: Any) -> Any:
            return jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0),
                stack,
                layer,
            )

        kept, first = residuals

        def back(carry: Any, step: tuple[Any, Distinct]) -> tuple[Any, None]:
            (stack, late, ct), (index, here) = carry, step
            stack = write(stack, late, jnp.minimum(index + 1, self.times - 1))
            residuals = here.tree(kept.before(index, first))
            late, d_x = self.layer.walk(read(stack, index), residuals, ct, leave)
            return (stack, late, d_x), None

        carry = params, read(params, self.times - 1), ct
        steps = jnp.arange(self.times), kept
        with in_layer(0, self.layer):
            (stack, late, d_x), _ = jax.lax.scan(back, carry, steps, reverse=True)
        return write(stack, late, 0), d_x

    def given(self, params: Any, *, key: chex.PRNGKey | None = None, mask: Any = None) -> Any:
        self.check_params(params, None)
        keys = None if key is None else jax.random.split(key, self.times)
        return jax.vmap(
            lambda params, key: self.layer.given(params, key=key, mask=mask),
            axis_size=self.times,
        )(params, keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distinct:
    """The residuals of a layer, or of a stack of them, each array once.

    Two parts of a layer often keep the same array. And where it keeps both its x and its y, the y
    of the layer before is its x, so that only y is kept, at the place ``carried``.
    """

    leaves: tuple[Any, ...]
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})
    carried: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tree: Any, x: Any, y: Any) -> Distinct:
        leaves, structure = jax.tree.flatten(tree)
        distinct = {id(leaf): leaf for leaf in leaves}
        carries = x is not y and id(x) in distinct and id(y) in distinct
        if carries:
            del distinct[id(x)]
        place = {key: index for index, key in enumerate(distinct)} | (
            {id(x): -1} if carries else {}
        )
        return cls(
            tuple(distinct.values()),
            tuple(place[id(leaf)] for leaf in leaves),
            structure,
            place[id(y)] if carries else None,
        )

    def before(self, index: Any, first: Any) -> Any:
        """Of a stack: the x of the layer at index, ``first`` for the first; () if not needed."""
        if self.carried is None:
            return ()
        ys = self.leaves[self.carried]
        y = jax.lax.dynamic_index_in_dim(ys, jnp.maximum(index - 1, 0), keepdims=False)
        return jnp.where(index == 0, first, y)

    def tree(self, x: Any) -> Any:
        """Of one layer: its residuals."""
        leaves = (*self.leaves, x)
        return jax.tree.unflatten(self.structure, [leaves[place] for place in self.places])


def repeat(layer: Layer, times: int) -> Repeat:
    """``times`` copies of the layer one after the other, each with params of its own, in one scan.

    Each leaf of params is the stack (times, ...) of the layers' leaves. The program is compiled for
    one layer, whatever the depth. The layer keeps the shape and dtype of x; others raise
    ``ValueError``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 12)
        >>> net.init(jax.random.key(0), jnp.ones((2, 4)))[0].w.shape
        (12, 4, 4)
    """
    return Repeat(layer, times)


def _added_up(left: Any) -> Any:
    def is_total(node: Any) -> bool:
        return isinstance(node, Total)

    def add(node: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), node) if is_total(node) else node

    return jax.tree.map(add, left, is_leaf=is_total)
