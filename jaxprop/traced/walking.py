"""The walk through the stages of a function, forward and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import is_inexact
from jaxprop.core.combinator import over_layers
from jaxprop.core.cotangents import summed
from jaxprop.core.layer import Layer
from jaxprop.core.step import Layerwise, Placed, Step, Visit
from jaxprop.core.tree import map_modules, numbered
from jaxprop.core.types import Cotangent, Params, PyTree, Visited
from jaxprop.traced.equations import first_of
from jaxprop.traced.example import Example
from jaxprop.traced.layers import TapeOfLayers, add, layers_ahead, layers_back
from jaxprop.traced.piece import Shares, Tape, zeros
from jaxprop.traced.shares import Own, together
from jaxprop.traced.stages import Layers, Straight


class Module(NamedTuple):
    """Params that lie together in a node of their tree.

    Attributes:
        params: the node.
        numbers: the number of each leaf.
        place: what a visit keeps in the node's place.
    """

    params: Params
    numbers: PyTree
    place: PyTree

    @classmethod
    def all(cls, params: Params, place: PyTree) -> list[Module]:
        """Return the modules of params, and what a visit keeps in the place of each."""
        found: list[Module] = []
        map_modules(lambda *nodes: found.append(cls(*nodes)), params, numbered(params), place)
        return found


class WalkFacts(NamedTuple):
    """The static facts of a walk.

    Attributes:
        learned: the numbers of the learned params.
        structure: the structure of x.
        x: the shape and dtype of each leaf of x, for a batch of one example.
        y: the structure of y.
        of_one: for each leaf of y, whether it had an axis for the one example; otherwise it was a
            scalar, the mean over that example.
    """

    learned: frozenset[int]
    structure: Any
    x: tuple[jax.ShapeDtypeStruct, ...]
    y: Any
    of_one: tuple[bool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walked:
    """The residuals of the walk forward.

    Attributes:
        tapes: the residuals of each stage.
        facts: the static facts.
    """

    tapes: list[TapeOfRun | TapeOfLayers]
    facts: WalkFacts = dataclasses.field(metadata={"static": True})

    def cts(self, ct: Cotangent) -> dict[int, Cotangent]:
        """Return the cotangents of the leaves of y, by slot."""
        outs = zip(self.facts.y.flatten_up_to(ct), self.facts.of_one, strict=True)
        return {
            ~index: jnp.expand_dims(ct, 1) if of_one else ct
            for index, (ct, of_one) in enumerate(outs)
            if ct is not None
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TapeOfRun:
    """The residuals of a walk through a run of equations.

    Attributes:
        tape: the residuals of its piece.
        ins: the slots of its data.
        outs: the slots of its outputs.
    """

    tape: Tape
    ins: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    outs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def back(self, cts: dict[int, Cotangent], shares: Shares) -> None:
        """Turn the cotangents of the outputs into those of the data, and add to the shares."""
        d_data = self.tape.back([cts.pop(slot, None) for slot in self.outs], shares)
        for slot, d in zip(self.ins, d_data, strict=True):
            add(cts, slot, d)


def walk_ahead(one: Example, x: PyTree) -> tuple[PyTree, Walked]:
    """Return y, and the residuals of the walk.

    Args:
        one: the traced function.
        x: the x of all examples.
    """
    leaves, structure = jax.tree.flatten(x)
    slots = {slot: jnp.expand_dims(leaf, 1) for slot, leaf in enumerate(leaves)}
    alone = tuple(jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for leaf in leaves)
    tapes = [_stage_ahead(one, stage, slots, leaves) for stage in one.stages]
    outs = [slots[~index] for index in range(one.structure.num_leaves)]
    of_one = tuple(y.ndim > 1 for y in outs)
    outs = [jnp.squeeze(y, 1) if here else y for y, here in zip(outs, of_one, strict=True)]
    facts = WalkFacts(one.learned, structure, alone, one.structure, of_one)
    return jax.tree.unflatten(one.structure, outs), Walked(tapes, facts)


def _stage_ahead(
    one: Example, stage: Straight | Layers, slots: dict[int, Array], batched: Sequence[Array]
) -> TapeOfRun | TapeOfLayers:
    """Run a stage, put its outputs into their slots, and return its residuals."""
    if isinstance(stage, Layers):
        return layers_ahead(stage, one.params, slots, batched)
    data = [slots[slot] for slot in stage.ins]
    alone = len(one.stages) == 1
    piece = one.whole if alone else one.piece(stage.program, list(map(first_of, data)))
    outs, tape = piece.ahead(data, batched)
    slots |= zip(stage.outs, outs, strict=True)
    return TapeOfRun(tape, stage.ins, stage.outs)


class Back:
    """The walk back, from a cotangent of y to those of params, by number, and of x, by slot."""

    def __init__(self, walked: Walked, ct: Cotangent) -> None:
        self._walked, self._cts = walked, walked.cts(ct)
        self._batched = list(self._cts.values())
        self._shares: Shares = {number: [] for number in walked.facts.learned}
        self._of_layers: dict[int, Cotangent] = {}

    def go(self, layer: Layer, modules: Sequence[Module], visit: Visit) -> dict[int, Visited]:
        """Walk back, and return the results of a ``Layerwise`` visit in scans, by module number."""
        visited: dict[int, Visited] = {}
        for tape in reversed(self._walked.tapes):
            if isinstance(tape, TapeOfRun):
                tape.back(self._cts, self._shares)
                continue
            within = {
                number: module
                for number, module in enumerate(modules)
                if not set(tape.flow.learned).isdisjoint(jax.tree.leaves(module.numbers))
            }
            found = self._through(layer, tape, list(within.values()), visit)
            if isinstance(visit, Layerwise):
                visited |= zip(within, found, strict=True)
                continue
            for module, d_params in zip(within.values(), found, strict=True):
                numbers, structure = jax.tree.flatten(module.numbers)
                self._of_layers |= zip(numbers, structure.flatten_up_to(d_params), strict=True)
        return visited

    def _through(
        self, layer: Layer, tape: TapeOfLayers, modules: Sequence[Module], visit: Visit
    ) -> list[Any]:
        """Walk back through a scan, and return the result for each module."""
        if not isinstance(visit, Layerwise):
            visit = _summed if isinstance(visit, Placed) else _factored

        def at_layer(
            params: list[Params], shares: Shares, ct: PyTree, d_x: PyTree, saved: Tape
        ) -> list[Visited]:
            steps: list[Step] = []
            for module, here in zip(modules, params, strict=True):
                d_params = _d_params(here, module.numbers, shares, jax.tree.leaves(ct))
                steps.append(Step.of(layer, here, saved, ct, d_params, d_x, here))
            return list(map(visit, steps))

        params = [module.params for module in modules]
        return over_layers(layers_back(tape, self._cts, self._batched, params, at_layer))

    def d_params(self, module: Module) -> Cotangent:
        """Return the cotangents of a module's params, with ``()`` for any that is not learned."""
        shares, of_layers = self._shares, self._of_layers
        return _d_params(module.params, module.numbers, shares, self._batched, of_layers)

    def d_x(self) -> list[Cotangent]:
        """Return the cotangents of the leaves of x, None for integers."""
        each = [self._cts.get(slot) for slot in range(len(self._walked.facts.x))]
        for slot, like in enumerate(self._walked.facts.x):
            if each[slot] is None and is_inexact(like):  # y does not depend on it
                each[slot] = zeros(self._batched, like)
        return [None if d is None else jnp.squeeze(d, 1) for d in each]


def _d_params(
    params: Params,
    numbers: PyTree,
    shares: Shares,
    batched: Sequence[Array],
    of_layers: Mapping[int, Cotangent] = MappingProxyType({}),
) -> Cotangent:
    """Return the cotangents of params, from their shares or from the layers of a scan."""

    def of(number: int, param: Any) -> Cotangent:
        if number in of_layers:
            return of_layers[number]
        if number not in shares:
            return ()
        if not shares[number]:  # y does not depend on it
            return Own(zeros(batched, param))
        return together(shares[number])

    each, structure = jax.tree.flatten(numbers)
    nodes = structure.flatten_up_to(params)
    return jax.tree.unflatten(structure, map(of, each, nodes))


def _factored(step: Step) -> Cotangent:
    return step.d_params


def _summed(step: Step) -> Cotangent:
    return summed(step.d_params)
