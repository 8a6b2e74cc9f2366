"""A scan over layers of params, forward and back: each layer is visited once its forms exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import is_inexact
from jaxprop.core.mesh import shard_map_axes, varying_zero
from jaxprop.core.residuals import Distinct
from jaxprop.core.types import Cotangent, PyTree
from jaxprop.traced.equations import evaluate, first_of, struct
from jaxprop.traced.piece import Piece, Shares, Tape
from jaxprop.traced.stages import Flow, Layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapeOfLayers:
    """The residuals of a walk through the layers of a scan.

    Attributes:
        kept: what each layer saved.
        views: the stacks of the learned params.
        fixed: the constants that are the same for all examples.
        fixed_stacks: the stacks that are the same for all examples.
        consts: the constants that are data.
        flow: the inputs and outputs of the scan.
        outs: the shape and dtype of each carried value, and of one layer's entry in each stacked
            output.
    """

    kept: Distinct
    views: list[Array]
    fixed: list[Array]
    fixed_stacks: list[Array]
    consts: list[Array]
    flow: Flow = dataclasses.field(metadata={"static": True})
    outs: tuple[jax.ShapeDtypeStruct, ...] = dataclasses.field(metadata={"static": True})

    def known(self, views: Sequence[Array], fixed_stacks: Sequence[Array]) -> list[Array]:
        """Return the arrays that a layer need not keep, given its own params and fixed values."""
        return [*views, *self.fixed, *fixed_stacks, *self.consts]


def layers_ahead(
    layers: Layers, params: Sequence[Array], slots: dict[int, Array], batched: Sequence[Array]
) -> TapeOfLayers:
    """Run the scan, put its outputs into their slots, and return its residuals.

    Args:
        layers: the scan.
        params: all params.
        slots: the data, with all examples on axis 0.
        batched: arrays of all examples, as in ``Piece.ahead``.
    """
    flow, each = layers.flow, iter(layers.before.run(params, evaluate))
    views = [next(each) for _ in flow.learned]
    fixed = [next(each) for _ in range(flow.fixed)]
    fixed_stacks = [next(each) for _ in range(flow.fixed_stacks)]
    carry = [
        _of_all(next(each), batched) if slot is None else _varying(slots[slot], batched)
        for slot in flow.carry
    ]
    consts = [slots[slot] for slot in flow.consts]
    stacks = [jnp.moveaxis(slots[slot], 1, 0) for slot in flow.stacks]
    tape = TapeOfLayers(
        Distinct((), (), None, None, ()), views, fixed, fixed_stacks, consts, flow, ()
    )
    found: list[tuple[jax.ShapeDtypeStruct, ...]] = []

    def step(carry: list[Array], here: Any) -> tuple[list[Array], Any]:
        views, fixed_stacks, stacks = here
        data = [*consts, *carry, *stacks]
        of_layer = dict(zip(flow.learned, views, strict=True))
        piece = Piece(layers.body, of_layer, [*fixed, *fixed_stacks], list(map(first_of, data)))
        outs, saved = piece.ahead(data, batched)
        found.append(tuple(map(struct, outs)))
        kept = Distinct.of(saved, tape.known(views, fixed_stacks), (), ())
        return outs[: len(carry)], (outs[len(carry) :], kept)

    carry, (ys, kept) = jax.lax.scan(
        step, carry, (views, fixed_stacks, stacks), **dict(flow.options)
    )
    ys = [jnp.moveaxis(y, 0, 1) for y in ys]
    slots |= {
        slot: out for slot, out in zip(flow.outs, [*carry, *ys], strict=True) if slot is not None
    }
    return dataclasses.replace(tape, kept=kept, outs=found[-1])


def layers_back(
    tape: TapeOfLayers,
    cts: dict[int, Cotangent],
    batched: Sequence[Array],
    own: PyTree,
    visit: Callable[[PyTree, Shares, list[Cotangent], list[Cotangent], Tape], Any],
) -> Any:
    """Walk back, add to the cotangents in the slots, and return each layer's result of the visit.

    Args:
        tape: what ``layers_ahead`` saved.
        cts: the cotangents by slot.
        batched: arrays of all examples.
        own: a tree of stacks, whose entries for a layer are passed to the layer's visit.
        visit: called with a layer's entries of ``own``, its shares, the cotangents of its outputs
            and of its data, and what it saved.
    """
    flow = tape.flow
    pairs = list(zip(flow.outs, tape.outs, strict=True))
    carried = len(flow.carry)

    def ct_of(slot: int | None, like: Any, *stack: int) -> Cotangent:
        """Return the cotangent of an output; None for integers."""
        if not is_inexact(like):
            return None
        if slot is not None and slot in cts:
            ct = cts.pop(slot)
            return jnp.moveaxis(ct, 1, 0) if stack else ct
        return _varying(jnp.zeros((*stack, *like.shape), like.dtype), batched)

    length = dict(flow.options)["length"]
    ct_carry = [ct_of(slot, like) for slot, like in pairs[:carried]]
    ct_ys = [ct_of(slot, like, length) for slot, like in pairs[carried:]]
    d_consts = [
        _varying(jnp.zeros(const.shape, const.dtype), [const]) if is_inexact(const) else None
        for const in tape.consts
    ]

    def step(carry: Any, here: Any) -> tuple[Any, Any]:
        ct_carry, d_consts = carry
        kept, views, fixed_stacks, ct_ys, own = here
        saved = kept.tree(tape.known(views, fixed_stacks), ())
        shares: Shares = {number: [] for number in flow.learned}
        d_data = saved.back([*ct_carry, *ct_ys], shares)
        more, d_carry, d_stacks = _split(d_data, len(d_consts), carried)
        d_consts = jax.tree.map(jnp.add, d_consts, more)
        visited = visit(own, shares, [*ct_carry, *ct_ys], d_data, saved)
        return (d_carry, d_consts), (visited, d_stacks)

    here = tape.kept, tape.views, tape.fixed_stacks, ct_ys, own
    options = dict(flow.options) | {"reverse": not dict(flow.options)["reverse"]}
    (d_carry, d_consts), (visited, d_stacks) = jax.lax.scan(
        step, (ct_carry, d_consts), here, **options
    )
    d_stacks = [None if d is None else jnp.moveaxis(d, 0, 1) for d in d_stacks]
    ins = *flow.consts, *flow.carry, *flow.stacks
    for slot, d in zip(ins, (*d_consts, *d_carry, *d_stacks), strict=True):
        if slot is not None:
            add(cts, slot, d)
    return visited


def add(cts: dict[int, Cotangent], slot: int, ct: Cotangent) -> None:
    """Add a cotangent to the cotangent in a slot, unless it is None, as it is for integers."""
    if ct is not None:
        cts[slot] = cts[slot] + ct if slot in cts else ct


def _of_all(value: Array, batched: Sequence[Array]) -> Array:
    """Return a value repeated for each example."""
    return _varying(jnp.broadcast_to(value, (batched[0].shape[0], *value.shape)), batched)


def _varying(value: Array, arrays: Sequence[Array]) -> Array:
    """Return a value; in ``jax.shard_map`` its type varies along each axis that an array's does."""
    if not shard_map_axes() or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return value + varying_zero(arrays, value.dtype)


def _split(values: list[Any], *lengths: int) -> list[list[Any]]:
    parts = []
    for length in lengths:
        parts.append(values[:length])
        values = values[length:]
    return [*parts, values]
