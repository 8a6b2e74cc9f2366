"""Running each kind of layer position by position.

Most layers are applied to the new positions alone, and attention keeps the keys and values of the
previous ones. This is unrelated to backpropagation, and so it is not a method of the layers:
``step`` has a rule for each class that needs one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jaxprop.combinators.branch import Branch
from jaxprop.combinators.cast import Cast
from jaxprop.combinators.chain import Chain
from jaxprop.combinators.frozen import Frozen
from jaxprop.combinators.on import On
from jaxprop.combinators.recompute import Recompute
from jaxprop.combinators.repeat import Repeat
from jaxprop.combinators.shared import Shared
from jaxprop.combinators.skip import Skip
from jaxprop.combinators.tied import Tied
from jaxprop.core.arrays import rounded
from jaxprop.core.child import Child
from jaxprop.core.combinator import Combinator, in_layer
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask, arrays
from jaxprop.core.types import Params, PyTree
from jaxprop.layers import Attention, Item, Positions, Rotary, SinusoidalPositions
from jaxprop.layers.heads import Inputs, positions, split
from jaxprop.layers.recurrence import Recurrence
from jaxprop.layers.scores import Keys, Queries, attend
from jaxprop.sharding import Gathered

State: TypeAlias = Any
"""The state that a layer keeps of previous positions: a pytree of arrays, ``()`` for nothing."""


class Now(NamedTuple):
    """The place of a net in its sequence.

    Attributes:
        at: the number of positions before x.
        length: the number of positions that there is room for.
    """

    at: Int[Array, ""]
    length: int


@functools.singledispatch
def step(
    layer: Layer, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    """Return ``(y, state)`` of the layer at the next positions, given its state from the others.

    Args:
        layer: the layer, whose class chooses the rule. A layer without a rule is applied to x.
        params: its params.
        state: the state that it returned for the previous positions; None at the start.
        x: its input at the next positions.
        now: the place of these positions.
    """
    if not _is_by_position(layer):
        hint = "; take jp.inference_mode(net)" if layer.batch_coupled else ""
        raise ValueError(
            f"{layer} does not treat each position by itself, and how it goes on from position to "
            f"position is not known{hint}"
        )
    return layer.forward(params, x)[0], ()


def _is_by_position(layer: Layer) -> bool:
    """Return whether a layer without a rule, and every layer in it, treats all positions alike."""
    has_rule = step.dispatch(type(layer)) is not step.dispatch(object)
    if has_rule and not isinstance(layer, Combinator | Cast | Shared):
        return False
    mixes = layer.mixes_positions or layer.takes is Mask or layer.batch_coupled
    return not mixes and all(_is_by_position(child.layer) for child in layer.children())


@step.register
def _attention(
    layer: Attention, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    """Keep k and v, (N, kv_heads, length, d), of which later positions are not seen.

    The query heads that share a key become further queries at the same positions.
    """
    if isinstance(x, tuple) and not layer.causal and Inputs.of(x).bias is None:
        return layer.forward(params, x)[0], ()
    if isinstance(x, tuple) or not layer.causal or isinstance(params, Mask):
        raise ValueError(
            f"{layer} cannot go on from position to position: it must be causal, without a bias "
            "and a mask, or of a memory"
        )
    layer.check_params(params, x)
    q, *new = split(layer, Inputs(x))
    n, heads, t, d = q.shape
    room = jnp.zeros((n, heads // layer.groups, now.length, d), x.dtype)
    kept = (room, room) if state is None else state
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(before, z, now.at, 2)
        for before, z in zip(kept, new, strict=True)
    )
    at = jnp.tile(now.at + positions(0, t), (1, 1, layer.groups, 1))
    q = q.reshape(n, heads // layer.groups, layer.groups * t, d)
    (y, _), _ = attend(layer, Keys(k, v), Queries(q, at))
    return y.reshape(n, heads, t, d).swapaxes(1, 2).reshape(n, t, heads * d).astype(x.dtype), (k, v)


@step.register
def _recurrent(
    layer: Recurrence, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    """Keep the last state, from which the layer starts at the next call."""
    masked = isinstance(params.mask, Mask)
    if isinstance(x, tuple) or layer.reverse or layer.output != "sequence" or masked:
        raise ValueError(
            f"{layer} cannot go on from position to position: it must start from zeros and give "
            "all states, forwards and without a mask"
        )
    both = dataclasses.replace(layer, output="both")
    return both.forward(params, x if state is None else (x, state))[0]


@step.register(Positions)
@step.register(Rotary)
@step.register(SinusoidalPositions)
def _where(
    layer: Layer, params: Params, state: State | None, x: Array, now: Now
) -> tuple[Array, State]:
    """Apply the layer to x at its place in a sequence of the whole length."""
    whole = jnp.zeros((x.shape[0], now.length, *x.shape[2:]), x.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, x, now.at, 1)
    y, _ = layer.forward(params, whole)
    return jax.lax.dynamic_slice_in_dim(y, now.at, x.shape[1], 1), ()


@step.register
def _chain(
    net: Chain, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    net.check_places(params)
    return _one_after_the_other(net.layers, params, state, x, now)


@step.register
def _shared(
    net: Shared, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    return _one_after_the_other([net.layer] * net.times, [params] * net.times, state, x, now)


def _one_after_the_other(
    layers: Sequence[Layer], params: Sequence[Params], state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    states = [None] * len(layers) if state is None else list(state)
    for i, layer in enumerate(layers):
        with in_layer(i, layer):
            x, states[i] = step(layer, params[i], states[i], x, now)
    return x, tuple(states)


@step.register
def _branch(
    net: Branch, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    net.check_places(params)
    ys, states = [], []
    for i, layer in enumerate(net.layers):
        with in_layer(i, layer):
            y, kept = step(layer, params[i], None if state is None else state[i], x, now)
        ys.append(y)
        states.append(kept)
    join = Branch(tuple(map(Item, range(len(ys)))), net.join)
    return join.forward(((),) * len(ys), tuple(ys))[0], tuple(states)


@step.register
def _repeat(
    net: Repeat, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    def ahead(x: PyTree, layer: tuple[Params, State | None]) -> tuple[PyTree, State]:
        return step(net.layer, *layer, x, now)

    net.check_params(params, x)
    with in_layer(0, net.layer):
        return jax.lax.scan(ahead, x, (params, state), length=net.times)


@step.register(Frozen)
@step.register(Recompute)
def _within(
    net: Frozen | Recompute, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    return step(net.layer, params, state, x, now)


@step.register
def _gathered(
    net: Gathered, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    return step(net.layer, net.gathered(params), state, x, now)


@step.register
def _on(net: On, params: Params, state: State | None, x: PyTree, now: Now) -> tuple[PyTree, State]:
    part = Child(net.layer, net.part)
    y, state = step(net.layer, params, state, part.of(x), now)
    return part.put(x, y), state


@step.register
def _skip(net: Skip, params: Params, state: State | None, x: Array, now: Now) -> tuple[Any, State]:
    y, state = step(net.layer, params, state, x, now)
    return x + y, state


@step.register
def _cast(
    net: Cast, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    params = net.layer.rounded(params, net.dtype)
    return step(net.layer, params, state, rounded(x, net.dtype), now)


@step.register
def _tied(
    net: Tied, params: Params, state: State | None, x: PyTree, now: Now
) -> tuple[PyTree, State]:
    net.check_places(params)
    table, of_body = params
    rows, _ = net.embedding.forward(table, x)
    h, state = step(net.body, of_body, state, rows, now)
    return h @ arrays(table).astype(h.dtype).T, state
