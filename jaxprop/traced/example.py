"""A function of one example, traced, with its params as views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.describe import shapes
from jaxprop.core.mesh import shard_map_axes, zero_beside
from jaxprop.core.tree import arrays, is_not_learned
from jaxprop.core.types import Params, PyTree
from jaxprop.traced.equations import Program, for_tracing
from jaxprop.traced.taps import Taps, Use, run
from jaxprop.traced.views import Part, View, plain


class Example:
    """A function of one example, and what is tapped in it.

    Attributes:
        params: the leaves of params.
        learned: the numbers of those that are learned.
        structure: that of y.
        uses: where params meet data.
        taps: the shape and dtype of what they give there.
        owned: the numbers of the params that are used elsewhere too.
    """

    def __init__(
        self,
        program: Program,
        params: list[Any],
        learned: frozenset[int],
        alone: list[Any],
        structure: Any,
        watching: bool = False,
    ) -> None:
        self.params, self.learned, self.structure = params, learned, structure
        self._program, self._watching = program, watching
        self.owned: set[int] = set()
        taps = Taps(watching=watching)

        def first_run(xs: list[Any]) -> list[Array]:
            outs = self._run(taps, None, xs)
            taps.keep_shapes()
            return outs

        jax.eval_shape(first_run, alone)
        self.uses: tuple[Use, ...] = tuple(taps.uses)
        self.taps: list[jax.ShapeDtypeStruct] = taps.zeros

    @classmethod
    def of(
        cls,
        fn: Callable[..., PyTree],
        name: str,
        params: Params,
        x: PyTree,
        watching: bool = False,
    ) -> Example:
        """Return the function of the first example of x.

        Args:
            fn: the function of a batch.
            name: what it is called in messages.
            params: its params, with the types of what is not learned.
            x: a batch.
            watching: whether the results of named scopes are tapped too.

        Raises:
            TypeError: for a y that is not of arrays.
            ValueError: for a y without the example on axis 0.
        """
        nodes = jax.tree.leaves(params, is_leaf=is_not_learned)
        learned = frozenset(i for i, node in enumerate(nodes) if is_learned(node))
        each, of_params = jax.tree.flatten(arrays(params))
        each = [jnp.asarray(leaf) if isinstance(leaf, int | float) else leaf for leaf in each]
        xs, of_x = jax.tree.flatten(x)
        if shard_map_axes():  # where a param and an example's own zero are of one type
            for index in learned:
                each[index] += zero_beside(xs, each[index].dtype)
        found: list[Any] = []

        def flat(each: list[Any], xs: list[Any]) -> list[Any]:
            y = fn(jax.tree.unflatten(of_params, each), jax.tree.unflatten(of_x, xs))
            outs, structure = jax.tree.flatten(y)
            _check_y(name, y, outs)
            found.append(structure)
            return outs

        alone = list(map(_alone, xs))
        try:
            program = Program.of(jax.make_jaxpr(flat)(list(map(for_tracing, each)), alone))
        except Exception as error:
            error.add_note(f"{name} is called with a batch of one example, {shapes(alone)}")
            raise
        return cls(program, each, learned, alone, found[-1], watching)

    def run(
        self, taps: Sequence[Array], owns: dict[int, Array], xs: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        """Return the outputs, and the data at each use, without an axis of examples.

        Args:
            taps: the zeros that are added at each use.
            owns: those that are added to params, by number.
            xs: the leaves of x, of one example.
        """
        tapped = Taps(taps, watching=self._watching)
        outs = self._run(tapped, owns, [leaf[None] for leaf in xs])
        return [out[0] if out.ndim else out for out in outs], tapped.xs

    def _run(self, taps: Taps, owns: dict[int, Array] | None, xs: Sequence[Array]) -> list[Array]:
        args = [
            self._view(index, owns) if index in self.learned else leaf
            for index, leaf in enumerate(self.params)
        ]
        return list(map(plain, run(self._program, [*args, *xs], taps)))

    def _view(self, index: int, owns: dict[int, Array] | None) -> View:
        leaf = self.params[index]

        def own() -> Array:
            self.owned.add(index)
            return leaf if owns is None else leaf + owns[index]

        return View((Part(index, ()),), leaf, own)


def is_learned(node: Any) -> bool:
    """Return whether a leaf of params, or what marks it, is learned."""
    return not is_not_learned(node) and bool(jnp.issubdtype(jnp.result_type(node), jnp.floating))


def zeros(beside: Sequence[Array], like: Any) -> Array:
    """Return zeros like an array, for each example of the arrays that they stand beside."""
    zero = zero_beside(beside, like.dtype)
    return jnp.broadcast_to(zero, (beside[0].shape[0], *like.shape))


def _alone(leaf: Any) -> Any:
    """Return the first example of a leaf of x, for tracing."""
    if shard_map_axes():
        return jax.lax.slice_in_dim(leaf, 0, 1)
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)


def _check_y(name: str, y: PyTree, outs: list[Any]) -> None:
    if not outs or not all(hasattr(out, "ndim") for out in outs):
        raise TypeError(f"{name} gives {shapes(y)}, not arrays")
    if any(out.ndim and out.shape[0] != 1 for out in outs):
        raise ValueError(
            f"{name} gives {shapes(y)} for a batch of one example: axis 0 of every array of y is "
            "the example, or y is a scalar, the mean over examples"
        )
