"""Quantities that are asked for together: one forward, and one walk back for each source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.cotangents import factored
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.step import Step
from jaxprop.core.tree import learned
from jaxprop.core.types import Cotangent, OfBatch, Params, PyTree, Visited
from jaxprop.core.walk import Forward, check_net_and_loss, forward
from jaxprop.quantity.base import Batch, Quantity
from jaxprop.quantity.curvature import AddedUp
from jaxprop.quantity.micro_batches import in_micro_batches
from jaxprop.quantity.source import Source

COLUMNS = "jaxprop.columns"
FORMS = "jaxprop.forms"
SAMPLES = 0x73616D70  # folded into the key, so that samples are drawn apart from what layers draw


def quantities(
    net: Layer, loss: Loss, /, *, micro_batches: int = 1, **asked: Quantity
) -> OfBatch[dict[str, Any]]:
    """Return ``f(params, x, target)``, a dict of the quantities asked for, and the loss as "value".

    They share one pass forward, and one walk back for each source: the loss gradient, or a root of
    the loss Hessian.

    Args:
        net: the network. One that couples the examples of a batch raises ``ValueError``.
        loss: the loss.
        micro_batches: into how many equal parts the batch is split, which are gone through one
            after the other in the memory of one. The result is that of the whole batch.
        asked: the quantities by name, such as ``norms=jp.SqNorms()``.

    Raises:
        TypeError: for what is not a quantity.
        ValueError: for a quantity that is called "value", or that is of pairs of examples where
            there are micro-batches.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(2)), jp.HalfSquaredError(), jnp.ones((3, 4))
        >>> params = net.init(jax.random.key(0), x)
        >>> f = jp.quantities(net, loss, grads=jp.Gradient(), norms=jp.SqNorms())
        >>> {name: jax.tree.map(jnp.shape, result)
        ...  for name, result in f(params, x, jnp.ones((3, 2))).items()}
        {'value': (), 'grads': (AffineParams(w=(4, 2), b=(2,)),), 'norms': (3,)}
    """
    doc = 'Return a dict of the quantities asked for, and the loss as "value".'
    return of_batch("quantities", doc, net, together(net, loss, asked, micro_batches))


def together(
    net: Layer, loss: Loss, asked: Mapping[str, Quantity], micro_batches: int
) -> Callable[[Params, PyTree, PyTree, Array | None], dict[str, Any]]:
    """Return the quantities asked for as a function of (params, x, target, key)."""
    check_net_and_loss(net, loss)
    _check_asked(asked, micro_batches)
    settle_early = micro_batches == 1
    parts = in_micro_batches(net, _parts(net, loss, asked, settle_early), micro_batches)

    def taken_together(
        params: Params, x: PyTree, target: PyTree, key: Array | None
    ) -> dict[str, Any]:
        for_samples = None if key is None else jax.random.fold_in(key, SAMPLES)
        value, taken = parts(params, x, target, for_samples)
        batch = Batch(net, params, jax.tree.leaves(x)[0].shape[0], key)
        result = {"value": value}
        for name, quantity in asked.items():
            settled = taken[name] if settle_early else quantity.settle(taken[name])
            result[name] = quantity.end(settled, batch)
        return result

    return taken_together


def _parts(
    net: Layer, loss: Loss, asked: Mapping[str, Quantity], settle: bool
) -> Callable[..., tuple[Array, dict[str, PyTree]]]:
    by_source: dict[Source, dict[str, Quantity]] = {}
    for name, quantity in asked.items():
        by_source.setdefault(quantity.source, {})[name] = quantity

    def parts(
        params: Params, x: PyTree, target: PyTree, key: Array | None
    ) -> tuple[Array, dict[str, PyTree]]:
        ahead = forward(net, loss, params, x, target)
        taken: dict[str, PyTree] = {}
        for source, group in by_source.items():
            walks = _Walks(group, ahead, learned(params), settle)
            taken |= walks.of(source, key)
        return ahead.value, taken

    return parts


@dataclasses.dataclass(frozen=True)
class _Walks:
    """The walks back that quantities of one source are taken from.

    Attributes:
        asked: the quantities by name.
        ahead: the pass forward.
        params: the net's learned params.
        settle: whether to settle at each layer what was taken there.
    """

    asked: Mapping[str, Quantity]
    ahead: Forward
    params: Params
    settle: bool

    def of(self, source: Source, key: Array | None) -> dict[str, PyTree]:
        """Return what was taken, by name."""
        columns = source.columns(self.ahead, key)
        if columns.number == 1:
            taken = self._walk(columns.column(0))
            for name, quantity in self.asked.items():
                if quantity.stacked:
                    taken[name] = jax.tree.map(lambda leaf: leaf[None], taken[name])
            return taken
        if all(isinstance(quantity, AddedUp) for quantity in self.asked.values()):
            return self._one_by_one(columns.column, columns.number)
        axes = {name: 0 if quantity.stacked else None for name, quantity in self.asked.items()}
        walk = jax.vmap(lambda ct: self._walk(ct, COLUMNS), axis_name=COLUMNS, out_axes=axes)
        return walk(columns.all())

    def _walk(self, ct: Cotangent, over: str | None = None) -> dict[str, PyTree]:
        """Return what one walk takes; over is the ``jax.vmap`` axis of several."""
        examples, known = self.ahead.examples, self._before(ct)

        def visit(step: Step) -> Taken:
            forms, params = factored(step), step.learned
            taken: dict[str, PyTree] = {}
            for name, quantity in self.asked.items():
                extra: dict[str, Any] = {} if over is None else {"over": over}
                if name in known:
                    extra["before"] = known[name]
                here = quantity.take(params, forms, examples, **extra)
                taken[name] = quantity.settle(here) if self.settle else here
            return Taken(taken)

        visited, _ = self.ahead.back(ct, visit)
        return {
            name: quantity.gather(self.params, _picked(visited, name), examples)
            for name, quantity in self.asked.items()
        }

    def _before(self, ct: Cotangent) -> dict[str, PyTree]:
        """Return the results of what some quantities need to know beforehand, from a walk."""
        first = {name: q.before for name, q in self.asked.items() if q.before is not None}
        if not first:
            return {}
        taken = dataclasses.replace(self, asked=first, settle=True)._walk(ct)
        return {
            name: quantity.finish(taken[name], self.ahead.examples)
            for name, quantity in first.items()
        }

    def _one_by_one(self, column: Callable[[Any], Cotangent], number: int) -> dict[str, PyTree]:
        """Return what is taken where only a sum over the columns is kept."""
        asked: dict[str, AddedUp] = self.asked  # pyright: ignore[reportAssignmentType]

        def parts(forms: PyTree) -> dict[str, PyTree]:
            return {name: quantity.part(forms) for name, quantity in asked.items()}

        def with_forms(step: Step) -> Taken:
            forms = factored(step)
            return Taken(parts(forms) | {FORMS: forms})

        def add(totals: dict[str, PyTree], c: Array) -> tuple[dict[str, PyTree], None]:
            visited, _ = self.ahead.back(column(c), lambda step: Taken(parts(factored(step))))
            more = {name: _picked(visited, name) for name in asked}
            return jax.tree.map(jnp.add, totals, more), None

        visited, _ = self.ahead.back(column(0), with_forms)
        forms, first = _picked(visited, FORMS), {name: _picked(visited, name) for name in asked}
        totals, _ = jax.lax.scan(add, first, jnp.arange(1, number))
        return {
            name: quantity.whole(forms, totals[name], self.ahead.examples)
            for name, quantity in asked.items()
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taken:
    """What was taken at one layer, by name."""

    by_name: dict[str, Any]


def _picked(visited: Visited, name: str) -> PyTree:
    return jax.tree.map(
        lambda taken: taken.by_name[name], visited, is_leaf=lambda node: isinstance(node, Taken)
    )


def _check_asked(asked: Mapping[str, Quantity], micro_batches: int) -> None:
    if "value" in asked:
        raise ValueError("'value' is the name of the loss; call the quantity something else")
    for name, quantity in asked.items():
        if not isinstance(quantity, Quantity):
            raise TypeError(f"{name} is not a quantity but {quantity!r}; write jp.Gradient(), say")
        if quantity.of_pairs and micro_batches != 1:
            raise ValueError(
                f"{quantity} is of pairs of examples, and those of two micro-batches never meet"
            )
