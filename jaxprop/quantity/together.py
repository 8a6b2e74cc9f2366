"""Quantities computed together: one forward pass, and one walk back for each source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jaxprop.core.arrays import is_one
from jaxprop.core.batch import Batch
from jaxprop.core.checks import require
from jaxprop.core.cotangents import factored, scaled_up
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.mesh import by_xla, is_explicit
from jaxprop.core.step import Layerwise, Step, Visit
from jaxprop.core.tree import learned
from jaxprop.core.types import Cotangent, OfBatch, Params, PyTree, Visited
from jaxprop.core.walk import Forward, check_net_and_loss, forward
from jaxprop.quantity.base import Quantity, Whole, is_marked, map_forms
from jaxprop.quantity.curvature import AddedUp
from jaxprop.quantity.micro_batches import in_micro_batches
from jaxprop.quantity.per_example import OfForward
from jaxprop.quantity.source import Columns, LossGradient, Source

FORMS = "jaxprop.forms"
SAMPLES = 0x73616D70  # folded into the key, so that samples do not depend on what layers draw


def quantities(
    net: Layer, loss: Loss, /, *, micro_batches: int = 1, **asked: Quantity
) -> OfBatch[dict[str, Any]]:
    """Return ``f(params, x, target)``, which returns a dict of quantities and the loss, "value".

    The quantities share one forward pass, and one walk back for each source: the loss gradient, or
    a root of the loss Hessian.

    Args:
        net: the network. One that couples the examples of a batch raises ``ValueError``.
        loss: the loss.
        micro_batches: the number of equal parts to split the batch into. They are processed one
            after the other, in the memory of one. The result is that of the whole batch.
        asked: the quantities by name, such as ``norms=jp.SqNorms()``.

    Raises:
        TypeError: for an argument that is not a quantity.
        ValueError: for a quantity named "value", or one that compares pairs of examples if there
            are micro-batches.

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
    net: Layer,
    loss: Loss,
    asked: Mapping[str, Quantity],
    micro_batches: int,
    loss_scale: float | Array = 1.0,
) -> Callable[[Params, Batch], dict[str, Any]]:
    """Return a function of (params, batch) that computes the quantities asked for.

    Args:
        net: the network.
        loss: the loss.
        asked: the quantities by name.
        micro_batches: the number of parts to split the batch into.
        loss_scale: the factor that multiplies the gradient of the mean loss where the walk back
            starts, and divides the forms.
    """
    check_net_and_loss(net, loss)
    _check_asked(asked, micro_batches)
    settle_early = micro_batches == 1
    of_parts = _parts(net, loss, asked, settle_early, loss_scale)
    parts = in_micro_batches(net, of_parts, micro_batches)

    def taken_together(params: Params, batch: Batch) -> dict[str, Any]:
        check_uncoupled(net, params, batch.x)
        key = batch.key
        for_samples = None if key is None else jax.random.fold_in(key, SAMPLES)
        given = params, batch._replace(key=for_samples)
        first = next(iter(jax.tree.leaves(batch.x)), None)
        if first is None:
            raise ValueError(f"{net} takes an x of one array at least, not {batch.x!r}")
        if is_explicit(first):
            value, taken = by_xla(parts, functools.partial(_laid_out_as, first), *given)
        else:
            value, taken = parts(*given)
        examples = batch.examples(first.shape[0])
        whole = Whole(params, examples, key)
        result = {"value": value}
        for name, quantity in asked.items():
            settled = taken[name] if settle_early else quantity.settle(taken[name])
            result[name] = quantity.end(settled, whole)
        return result

    return taken_together


def alone(
    net: Layer, loss: Loss, quantity: Quantity, micro_batches: int
) -> Callable[[Params, Batch], Any]:
    """Return a function of (params, batch) that computes one quantity."""
    f = together(net, loss, {"it": quantity}, micro_batches)
    return lambda params, batch: f(params, batch)["it"]


def _parts(
    net: Layer,
    loss: Loss,
    asked: Mapping[str, Quantity],
    settle: bool,
    loss_scale: float | Array,
) -> Callable[..., tuple[Array, dict[str, PyTree]]]:
    by_source: dict[Source, dict[str, Quantity]] = {}
    of_forward: dict[str, OfForward] = {}
    for name, quantity in asked.items():
        if isinstance(quantity, OfForward):
            of_forward[name] = quantity
        else:
            by_source.setdefault(quantity.source, {})[name] = quantity

    def parts(params: Params, batch: Batch) -> tuple[Array, dict[str, PyTree]]:
        ahead = forward(net, loss, params, batch)
        taken = {name: quantity.of_forward(ahead) for name, quantity in of_forward.items()}
        for source, group in by_source.items():
            scale = None
            if source == LossGradient() and not is_one(loss_scale):
                scale = loss_scale / ahead.examples.divisor
            walks = _Walks(group, ahead, learned(params), settle, scale)
            taken |= walks.of(source, batch.key)
        return ahead.value, taken

    return parts


@dataclasses.dataclass(frozen=True)
class _Walks:
    """The walks back that compute the quantities with one source.

    Attributes:
        asked: the quantities by name.
        ahead: the forward pass.
        params: the net's learned params.
        settle: whether to settle each layer's part at that layer.
        scale: the factor on each example's own cotangent where a walk starts, or None.
    """

    asked: Mapping[str, Quantity]
    ahead: Forward
    params: Params
    settle: bool
    scale: float | Array | None = None

    def of(self, source: Source, key: Array | None) -> dict[str, PyTree]:
        """Return the gathered parts, by name."""
        columns = source.columns(self.ahead, key)
        if columns.number > 1:
            return self._one_by_one(columns)
        taken = self._walk(columns.column(0), self._before(columns.column(0)))
        return {
            name: _stacked(here, 1) if self.asked[name].stacked else here
            for name, here in taken.items()
        }

    def _walk(self, ct: Cotangent, known: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Return the gathered parts from one walk, by name."""

        def visit(step: Step) -> Taken:
            forms = self._scaled_back(factored(step))
            return Taken({name: self._take(name, step, forms, known) for name in self.asked})

        ct = ct if self.scale is None else scaled_up(ct, self.scale)
        visited, _ = self.ahead.back(ct, self._paid(visit))
        return self._gathered(visited)

    def _scaled_back(self, forms: PyTree) -> PyTree:
        if self.scale is None:
            return forms
        back = jnp.full(self.ahead.examples.number, 1 / self.scale)
        return map_forms(lambda form: form.scaled(back), forms)

    def _one_by_one(self, columns: Columns) -> dict[str, PyTree]:
        """Return the parts from one walk per column, by name: added up, or stacked."""
        added: dict[str, AddedUp] = {}
        for name, quantity in self.asked.items():
            if isinstance(quantity, AddedUp):
                added[name] = quantity
            elif not quantity.stacked:
                raise TypeError(
                    f"{quantity} is of a source of {columns.number} columns: it stacks what it "
                    "takes of each (stacked = True), or is a jp.quantity.AddedUp"
                )

        def of_column(step: Step, forms: PyTree) -> dict[str, PyTree]:
            return {
                name: added[name].part(forms, self.ahead.examples)
                if name in added
                else self._take(name, step, forms, {})
                for name in self.asked
            }

        def with_forms(step: Step) -> Taken:
            forms = factored(step)
            return Taken(of_column(step, forms) | {FORMS: forms})

        def another(sofar: dict[str, PyTree], c: Array) -> tuple[dict[str, PyTree], None]:
            visit = self._paid(lambda step: Taken(of_column(step, factored(step))))
            visited, _ = self.ahead.back(columns.column(c), visit)
            taken = self._gathered(visited)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=c, axis=0)
            return {
                name: jax.tree.map(jnp.add if name in added else put, sofar[name], taken[name])
                for name in self.asked
            }, None

        visited, _ = self.ahead.back(columns.column(0), self._paid(with_forms))
        start = {
            name: taken if name in added else _stacked(taken, columns.number)
            for name, taken in self._gathered(visited).items()
        }
        taken, _ = jax.lax.scan(another, start, jnp.arange(1, columns.number))
        forms = _picked(visited, FORMS)
        return taken | {
            name: quantity.whole(forms, taken[name], self.ahead.examples)
            for name, quantity in added.items()
        }

    def _paid(self, visit: Visit) -> Visit:
        """Return the visit, made ``Layerwise`` unless a quantity needs whole modules."""
        layerwise = all(quantity.layerwise for quantity in self.asked.values())
        return Layerwise(visit) if layerwise else visit

    def _take(self, name: str, step: Step, forms: PyTree, known: Mapping[str, PyTree]) -> PyTree:
        """Return one quantity's part from one layer."""
        quantity = self.asked[name]
        extra = {"before": known[name]} if name in known else {}
        params, forms = (quantity.chosen(step.layer, tree) for tree in (step.learned, forms))
        here = quantity.take(params, forms, self.ahead.examples, **extra)
        return quantity.settle(here) if self.settle else here

    def _gathered(self, visited: Visited) -> dict[str, PyTree]:
        return {
            name: quantity.gather(self.params, _picked(visited, name), self.ahead.examples)
            for name, quantity in self.asked.items()
        }

    def _before(self, ct: Cotangent) -> dict[str, PyTree]:
        """Return the results that some quantities need beforehand, from a separate walk."""
        first = {name: q.before for name, q in self.asked.items() if q.before is not None}
        if not first:
            return {}
        known: dict[str, PyTree] = {}
        ahead = dataclasses.replace(self, asked=first, settle=True)._walk(ct, {})
        for name, taken in ahead.items():
            marked = map(is_marked, jax.tree.leaves(taken, is_leaf=is_marked))
            if not self.settle and not all(marked):
                raise ValueError(
                    f"{self.asked[name]} is told {first[name]} before, which is of the whole "
                    "batch: a micro-batch does not know it"
                )
            known[name] = first[name].finish(taken, self.ahead.examples)
        return known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taken:
    """The parts taken at one layer, by the name of the quantity."""

    by_name: dict[str, Any]


def _laid_out_as(x: Array, taken: PyTree) -> PyTree:
    """Return the partition specs of what was taken: marked arrays are split as the examples of x.

    All other arrays are on all devices.
    """
    of_examples = jax.typeof(x).sharding.spec[0]

    def place(node: Any) -> Any:
        if not is_marked(node):
            return PartitionSpec()
        ahead = [(None,) * (node.axis % leaf.ndim) for leaf in jax.tree.leaves(node)]
        specs = [PartitionSpec(*axes, of_examples) for axes in ahead]
        return jax.tree.unflatten(jax.tree.structure(node), specs)

    return jax.tree.map(place, taken, is_leaf=is_marked)


def _picked(visited: Visited, name: str) -> PyTree:
    return jax.tree.map(
        lambda taken: taken.by_name[name], visited, is_leaf=lambda node: isinstance(node, Taken)
    )


def _stacked(taken: PyTree, times: int) -> PyTree:
    """Return one column's parts, repeated the given number of times on a leading axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (times, *leaf.shape)), taken)


def _check_asked(asked: Mapping[str, Quantity], micro_batches: int) -> None:
    if "value" in asked:
        raise ValueError("'value' is the name of the loss; call the quantity something else")
    for name, quantity in asked.items():
        require(quantity, Quantity, name)
        before = quantity.before
        if before is not None and before.source != quantity.source:
            raise ValueError(
                f"{quantity} is told {before} before, which has another source: {before.source}, "
                f"not {quantity.source}"
            )
        if quantity.of_pairs and micro_batches != 1:
            raise ValueError(
                f"{quantity} is of pairs of examples, and those of two micro-batches never meet"
            )
