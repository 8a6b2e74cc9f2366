"""A piece of a function of one example, with its params as views: its run and its walk back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import is_inexact
from jaxprop.core.forms import Factored, Moves, Sum
from jaxprop.core.mesh import varying_zero
from jaxprop.core.types import Cotangent
from jaxprop.traced.equations import Program, for_tracing
from jaxprop.traced.interpreter import run
from jaxprop.traced.shares import Own, share
from jaxprop.traced.taps import Taps, Use
from jaxprop.traced.views import ParamPart, View, placed, plain

Shares: TypeAlias = dict[int, list[tuple[Factored, Moves]]]


class Piece:
    """A part of a function of one example, and its taps.

    Attributes:
        uses: the places where params meet data.
        taps: the shape and dtype of the zero at each use, as in ``Taps.zeros``.
        owned: the numbers of the params with other uses, which need each example's own share.
    """

    def __init__(
        self,
        program: Program,
        views: Mapping[int, Any],
        fixed: Sequence[Any],
        data: Sequence[Any],
        watching: bool = False,
    ) -> None:
        """Trace the program for its uses.

        Args:
            program: the equations; its inputs are views, then fixed values, then data.
            views: the learned params, by number.
            fixed: the inputs that are the same for all examples.
            data: the inputs that belong to one example, for tracing.
            watching: whether the results of named scopes are tapped too.
        """
        self._program, self._views, self._fixed, self._watching = program, views, fixed, watching
        self.owned: set[int] = set()
        taps = Taps(watching=watching)

        def first_run(data: list[Any]) -> list[Array]:
            outs = self._run(taps, None, data)
            taps.keep_shapes()
            return outs

        jax.eval_shape(first_run, list(map(for_tracing, data)))
        self.uses: tuple[Use, ...] = tuple(taps.uses)
        self.taps: list[Any] = taps.zeros

    def ahead(self, data: Sequence[Array], batched: Sequence[Array]) -> tuple[list[Array], Tape]:
        """Return the outputs for all examples, and the residuals of the walk back.

        Args:
            data: the data of all examples, which are on axis 0.
            batched: arrays of all examples. In ``jax.shard_map`` their types vary along every mesh
                axis along which the type of any of the data does.
        """
        moving = tuple(map(is_inexact, data))

        def of_batch(taps: Any, owns: Any, some: list[Array]) -> tuple[list[Array], Any]:
            each = jax.vmap(self._tapped, axis_size=batched[0].shape[0])
            outs, xs = each(taps, owns, placed(some, moving, data))
            return list(filter(is_inexact, outs)), (outs, xs)

        taps = jax.tree.map(lambda struct: zeros(batched, struct), self.taps)
        owns = {index: zeros(batched, self._views[index]) for index in self.owned}
        some = list(filter(is_inexact, data))
        moved, pull, (outs, xs) = jax.vjp(of_batch, taps, owns, some, has_aux=True)
        moves = tuple(map(is_inexact, outs))
        return placed(moved, moves, outs), Tape(pull, xs, Facts(self.uses, moving, moves))

    def _tapped(
        self, taps: Sequence[Any], owns: dict[int, Array], data: Sequence[Array]
    ) -> tuple[list[Array], list[Any]]:
        """Return the outputs, and the data at each use.

        Args:
            taps: the zeros to add at each use.
            owns: the zeros to add to params, by number.
            data: the data.
        """
        tapped = Taps(taps, watching=self._watching)
        return self._run(tapped, owns, data), tapped.xs

    def _run(self, taps: Taps, owns: dict[int, Array] | None, data: Sequence[Array]) -> list[Array]:
        views = [self._view(index, owns) for index in self._views]
        return list(map(plain, run(self._program, [*views, *self._fixed, *data], taps)))

    def _view(self, index: int, owns: dict[int, Array] | None) -> View:
        leaf = self._views[index]

        def own() -> Array:
            self.owned.add(index)
            return leaf if owns is None else leaf + owns[index]

        return View((ParamPart(index, ()),), leaf, own)


class Facts(NamedTuple):
    """The static facts of a walk through a piece.

    Attributes:
        uses: the places where params meet data.
        moving: for each of the data, whether it is floating or complex, and so has a cotangent.
        moves: the same for each of the outputs.
    """

    uses: tuple[Use, ...]
    moving: tuple[bool, ...]
    moves: tuple[bool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tape:
    """The residuals of a walk through a piece.

    Attributes:
        pull: the function from ``jax.vjp``, which takes cotangents of the outputs to those of the
            zeros at the uses, of the zeros of owned params, and of the data.
        xs: the data at each use; None where they arrive with the cotangent.
        facts: the static facts.
    """

    pull: Any
    xs: list[Array | None]
    facts: Facts = dataclasses.field(metadata={"static": True})

    def back(self, cts: Sequence[Cotangent], shares: Shares) -> list[Cotangent]:
        """Return the cotangents of the data, None for integers, and add to the shares of params.

        Args:
            cts: the cotangents of the outputs; those of integers are ignored.
            shares: the forms of each learned param's uses, by number.
        """
        told, owns, d_some = self.told(cts)
        for use, x, ct in told:
            for part in use.parts:
                shares[part.param].append(share(use, part, x, ct))
        for index, own in owns.items():
            shares[index].append((Sum(own) if own.ndim == 2 else Own(own), ()))
        return placed(d_some, self.facts.moving, [None] * len(self.facts.moving))

    def told(
        self, cts: Sequence[Cotangent]
    ) -> tuple[list[tuple[Use, Array, Array]], dict[int, Array], list[Array]]:
        """Return each use with its data and cotangent, the owned params' shares, and d_data.

        Args:
            cts: the cotangents of the outputs, as in ``back``; d_data has only those of floating
                and complex data.
        """
        moved = [ct for ct, moves in zip(cts, self.facts.moves, strict=True) if moves]
        taps, owns, d_some = self.pull(moved)
        each = []
        for place, (use, x, tap) in enumerate(zip(self.facts.uses, self.xs, taps, strict=True)):
            ct = taps[place - use.before] if use.before else tap
            ct, x = ct if use.again else (ct, x)
            each.append((use, x, ct))
        return each, owns, d_some


def zeros(batched: Sequence[Array], like: Any) -> Array:
    """Return zeros of an array's shape for each example, with a type that suits ``batched``."""
    zero = varying_zero(batched, like.dtype)
    return jnp.broadcast_to(zero, (batched[0].shape[0], *like.shape))
