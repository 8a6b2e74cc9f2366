"""The fused update: each param is updated on the walk back, as soon as its gradient exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import is_one, wide
from jaxprop.core.cotangents import gradient
from jaxprop.core.forms import Factored, is_factored, norms
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.step import Placed, Replacing, Step
from jaxprop.core.tree import for_optimizer, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.training.attached import Attached, attached, bare, is_attached
from jaxprop.training.equations import SHARED, Equations, value_of


class FusedUpdate(Replacing):
    """The visit that replaces each param and its state by the optimizer's new ones.

    Args:
        apply: ``apply(grads, state, params, seen, value_fn)`` returns new (params, state).
        params: the net's params, side inputs included.
        state: the optimizer's state.
        seen: the facts of the whole batch that apply may use, such as the loss.
        depths: a tree like the learned params, the number of axes of layers of each.
        grads: a tree like the learned params, the sums over earlier micro-batches, or None.
        micro_batches: the number of micro-batches.
        scale: the loss scale that the cotangent of the net's output was multiplied by.

    Raises:
        ValueError: if the update of a param depends on another param's gradient or state, or the
            update of a layer in a ``repeat`` depends on other layers.
    """

    def __init__(
        self,
        apply: Callable[..., tuple[Params, PyTree]],
        params: Params,
        state: PyTree,
        seen: PyTree,
        depths: PyTree,
        grads: Params | None = None,
        micro_batches: int = 1,
        scale: float | Array = 1.0,
    ) -> None:
        def update(grads: Any, state: Any, params: Any, seen: Any) -> tuple[Any, Any]:
            return apply(grads, state, params, seen, _no_value_fn)

        arrays = for_optimizer(params)
        with jax.disable_jit():  # all equations at the top level, none nested
            closed = jax.make_jaxpr(update)(arrays, state, arrays, seen)
        self._all, self._micro_batches, self._scale = params, micro_batches, scale
        self._params, self._of_params = jax.tree.flatten(arrays)
        self._state, self._of_state = jax.tree.flatten(state)
        self._depths = jax.tree.leaves(depths)
        self._grads = grads
        self._equations = equations = Equations(closed.jaxpr, arrays, state)
        self._hold_stacks()
        given = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        given |= zip(equations.state_in, self._state, strict=True)
        given |= zip(equations.seen_in, jax.tree.leaves(seen), strict=True)
        self._shared = equations.run(SHARED, given.__getitem__) | given

    def places(self) -> PyTree:
        """Return the tree of places: the params, each with its state and sum of gradients."""
        states = [tuple(self._state[slot] for slot in slots) for slots in self._equations.slots]
        return attached(self._all, self._grads, states)

    def params(self, place: PyTree) -> Params:
        return bare(place)

    def __call__(self, step: Step) -> PyTree:
        return jax.tree.map(
            lambda node, grad: self._updated(node, grad) if is_attached(node) else node,
            step.place,
            merged(step.params, gradient(step, self._scale)),
            is_leaf=is_attached,
        )

    def results(self, places: PyTree) -> tuple[Params, PyTree]:
        """Return ``(params, state)`` from the replaced places; params are the learned ones."""
        leaves = filter(is_attached, jax.tree.leaves(places, is_leaf=is_attached))
        params = sorted(leaves, key=lambda leaf: leaf.index)
        equations = self._equations
        state = [
            value_of(out, self._shared.__getitem__) if equations.owner(out) == SHARED else None
            for out in equations.state_out
        ]
        for leaf in params:
            for slot, value in zip(equations.slots[leaf.index], leaf.state, strict=True):
                state[slot] = value
        new_params = jax.tree.unflatten(self._of_params, [leaf.param for leaf in params])
        return new_params, jax.tree.unflatten(self._of_state, state)

    def _updated(self, place: Attached, grad: Array) -> Attached:
        """Return the place with its param updated: a whole one, or one layer's part of a stack."""
        equations, index = self._equations, place.index
        stacked = self._depths[index]
        slots = equations.slots[index]
        if self._grads is not None:
            grad = mean_with(place.grad, grad, self._micro_batches)
        given = {equations.grads_in[index]: grad, equations.params_in[index]: place.param}
        given |= zip((equations.state_in[slot] for slot in slots), place.state, strict=True)

        def read(var: Any) -> Any:
            if var in given:
                return given[var]
            value = self._shared[var]
            return value[(0,) * stacked] if stacked and value.ndim else value  # same for all layers

        given |= equations.run(index, read)
        outs = equations.params_out[index], *(equations.state_out[slot] for slot in slots)
        param, *state = (value_of(out, read) for out in outs)
        return Attached(param, tuple(state), place.grad, index)

    def _hold_stacks(self) -> None:
        """Raise unless each layer of a stack of params can be updated alone."""
        equations = self._equations
        for index, (param, depth) in enumerate(zip(self._params, self._depths, strict=True)):
            if not depth:
                continue
            layers = param.shape[:depth]
            for slot in equations.slots[index]:
                shape = jnp.shape(self._state[slot])
                if shape[:depth] != layers:
                    raise ValueError(
                        f"fused: the optimizer has one state {shape} for the whole stack "
                        f"params{equations.names[index]}, not one for each layer; use fused=False"
                    )
            equations.hold_entrywise(index)


class NormsOfMean(Placed):
    """The visit that returns the norm of each param's mean gradient over all micro-batches.

    Args:
        micro_batches: the number of micro-batches.
        scale: the loss scale that the cotangent of the net's output was multiplied by.
    """

    def __init__(self, micro_batches: int, scale: float | Array = 1.0) -> None:
        self._micro_batches, self._scale = micro_batches, scale

    def params(self, place: PyTree) -> Params:
        return bare(place)

    def __call__(self, step: Step) -> list[Array]:
        places = jax.tree.leaves(step.place, is_leaf=is_attached)
        before = [place.grad for place in places if is_attached(place)]
        grads = jax.tree.leaves(gradient(step, self._scale))
        pairs = zip(before, grads, strict=True)
        means = [mean_with(total, grad, self._micro_batches) for total, grad in pairs]
        return [norms(mean[None])[0] for mean in means]


def norms_of_gradient(step: Step, scale: float | Array = 1.0) -> list[Array]:
    """Return the norm of the gradient of each of a layer's params, from factors where they suffice.

    A gradient is multiplied out first where it is rounded to a narrower param, which may make it
    infinite; in ``jax.shard_map``, where it is a sum over devices; and where it is divided by a
    scale other than 1, by which the first cotangent of the walk was multiplied.
    """

    def norm(leaf: Any) -> Array:
        return leaf.norm_of_sum() if isinstance(leaf, Factored) else norms(leaf[None])[0]

    narrow = any(wide(param).dtype != param.dtype for param in jax.tree.leaves(step.learned))
    summed = narrow or shard_map_axes() or not is_one(scale)
    whole = gradient(step, scale) if summed else step.d_params
    return list(map(norm, jax.tree.leaves(whole, is_leaf=is_factored)))


def mean_with(total: Array, grad: Array, micro_batches: int) -> Array:
    """Return the mean over micro-batches, from the total of the earlier ones and the last one."""
    return ((total + wide(grad)) / micro_batches).astype(grad.dtype)


def _no_value_fn(params: Params) -> Array:
    raise ValueError(
        "fused: this optimizer asks for the loss as a function of all params; use fused=False"
    )
