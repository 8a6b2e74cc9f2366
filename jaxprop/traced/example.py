"""A function of one example, traced, with its params as views."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprop.core.describe import shapes
from jaxprop.core.mesh import shard_map_axes, varying_zero
from jaxprop.core.tree import arrays, is_not_learned, map_modules, numbered
from jaxprop.core.types import Params, PyTree
from jaxprop.traced.equations import Program, for_tracing
from jaxprop.traced.piece import Piece
from jaxprop.traced.stages import Layers, Straight, stages_of


class Example:
    """A function of one example, traced.

    Attributes:
        params: the leaves of params.
        learned: the numbers of the learned leaves.
        structure: the structure of y.
        whole: the whole function, as one piece.
        stages: the stages of the function.
    """

    def __init__(
        self,
        program: Program,
        params: list[Any],
        learned: frozenset[int],
        modules: Sequence[frozenset[int]],
        alone: list[Any],
        structure: Any,
        watching: bool,
    ) -> None:
        self.params: list[Any] = params
        self.learned: frozenset[int] = learned
        self.structure: Any = structure
        self._watching = watching
        self._views = {index: params[index] for index in sorted(learned)}
        self._fixed = [leaf for index, leaf in enumerate(params) if index not in learned]
        stages = functools.partial(stages_of, program, learned, len(params))
        self.stages: tuple[Straight | Layers, ...] = stages(None if watching else modules)
        (whole,) = self.stages if len(self.stages) == 1 else stages(None)
        assert isinstance(whole, Straight)
        self.whole: Piece = self.piece(whole.program, [alone[slot] for slot in whole.ins])

    def piece(self, program: Program, data: Sequence[Any]) -> Piece:
        """Return the piece for a program of all params, and data."""
        return Piece(program, self._views, self._fixed, data, self._watching)

    @classmethod
    def of(
        cls,
        fn: Callable[..., PyTree],
        name: str,
        params: Params,
        x: PyTree,
        watching: bool = False,
    ) -> Example:
        """Trace the function for the first example of x.

        Args:
            fn: the function of a batch.
            name: its name in messages.
            params: its params, including the types that mark some as not learned.
            x: a batch.
            watching: whether the results of named scopes are tapped too.

        Raises:
            TypeError: if y is not made of arrays.
            ValueError: if y does not have the example on axis 0.
        """
        nodes = jax.tree.leaves(params, is_leaf=is_not_learned)
        learned = frozenset(i for i, node in enumerate(nodes) if is_learned(node))
        each, of_params = jax.tree.flatten(arrays(params))
        each = [jnp.asarray(leaf) if isinstance(leaf, int | float) else leaf for leaf in each]
        xs, of_x = jax.tree.flatten(x)
        if shard_map_axes():  # a param needs the type of an example's own zero
            for index in learned:
                each[index] += varying_zero(xs, each[index].dtype)
        found: list[Any] = []

        def flat(each: list[Any], xs: list[Any]) -> list[Any]:
            y = fn(jax.tree.unflatten(of_params, each), jax.tree.unflatten(of_x, xs))
            outs, structure = jax.tree.flatten(y)
            _check_y(name, y, outs)
            found.append(structure)
            return outs

        alone = list(map(_alone, xs))
        try:
            traced = jax.make_jaxpr(flat)(list(map(for_tracing, each)), alone)
        except Exception as error:
            error.add_note(f"{name} is called with a batch of one example, {shapes(alone)}")
            raise
        program = Program.of(traced).within()
        return cls(program, each, learned, _modules(params), alone, found[-1], watching)


def is_learned(node: Any) -> bool:
    """Return whether a leaf of params, or the node that marks it, is learned."""
    return not is_not_learned(node) and bool(jnp.issubdtype(jnp.result_type(node), jnp.floating))


def _alone(leaf: Any) -> Any:
    """Return the first example of a leaf of x, for tracing."""
    if shard_map_axes():
        return jax.lax.slice_in_dim(leaf, 0, 1)
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)


def _modules(params: Params) -> list[frozenset[int]]:
    """Return the numbers of the params of each module."""
    found: list[frozenset[int]] = []
    map_modules(
        lambda _, numbers: found.append(frozenset(jax.tree.leaves(numbers))),
        params,
        numbered(params),
    )
    return found


def _check_y(name: str, y: PyTree, outs: list[Any]) -> None:
    if not outs or not all(hasattr(out, "ndim") for out in outs):
        raise TypeError(f"{name} gives {shapes(y)}, not arrays")
    if any(out.ndim and out.shape[0] != 1 for out in outs):
        raise ValueError(
            f"{name} gives {shapes(y)} for a batch of one example: axis 0 of every array of y is "
            "the example, or y is a scalar, the mean over examples"
        )
