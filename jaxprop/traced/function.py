"""The layer of any JAX function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.forms import Stacked
from jaxprop.core.layer import Layer
from jaxprop.core.tree import arrays, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.traced.equations import Program, struct
from jaxprop.traced.shares import share, together
from jaxprop.traced.taps import Taps, Use, run
from jaxprop.traced.views import Part, View, plain


class Function(Layer):
    """y = fn(params, x), for any pure JAX function."""

    fn: Callable[..., PyTree]
    init_fn: Callable[..., Params] | None = None
    hands_down_types = True

    def __repr__(self) -> str:
        return f"function({getattr(self.fn, '__qualname__', self.fn)})"

    def init(self, key: Array, x: PyTree) -> Params:
        if self.init_fn is None:
            raise TypeError(f"{self} has no init: its params are the function's own")
        return self.init_fn(key, x)

    def check_params(self, params: Params, x: PyTree) -> None:
        pass

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        one = _Example.of(self, params, x)
        leaves = jax.tree.leaves(x)
        moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        number = leaves[0].shape[0]

        def zeros(like: Any) -> Array:
            return jnp.zeros((number, *like.shape), like.dtype)

        def of_batch(taps: Any, owns: Any, floating: list[Array]) -> tuple[list[Array], Any]:
            rest = iter(floating)
            whole = [next(rest) if m else leaf for m, leaf in zip(moving, leaves, strict=True)]
            return jax.vmap(one.run)(taps, owns, whole)

        floating = [leaf for leaf, m in zip(leaves, moving, strict=True) if m]
        taps = list(map(zeros, one.zeros))
        owns = {index: zeros(one.leaves[index]) for index in one.owned}
        outs, pull, xs = jax.vjp(of_batch, taps, owns, floating, has_aux=True)
        facts = _Facts(one.uses, jax.tree.structure(x), tuple(moving), one.learned)
        return jax.tree.unflatten(one.structure, outs), _Tape(pull, xs, facts)

    def backward(
        self, params: Params, residuals: _Tape, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        facts = residuals.facts
        taps, owns, floating = residuals.pull(jax.tree.leaves(ct))
        rest = iter(floating)
        d_x = [next(rest) if moves else None for moves in facts.moving]
        shares: dict[int, list[Any]] = {}
        for use, x, here in zip(facts.uses, residuals.xs, taps, strict=True):
            for part in use.parts:
                shares.setdefault(part.param, []).append(share(use, part, x, here))
        for index, each in owns.items():
            shares.setdefault(index, []).append((Stacked(each), ()))
        leaves, structure = jax.tree.flatten(params, is_leaf=is_not_learned)
        number = jax.tree.leaves(ct)[0].shape[0]
        d_params = []
        for index, leaf in enumerate(leaves):
            if index not in facts.learned:
                d_params.append(())
            elif index in shares:
                d_params.append(together(shares[index]))
            else:
                d_params.append(Stacked(jnp.zeros((number, *leaf.shape), leaf.dtype)))
        return jax.tree.unflatten(structure, d_params), jax.tree.unflatten(facts.x, d_x)


class _Facts(NamedTuple):
    uses: tuple[Use, ...]
    x: Any
    moving: tuple[bool, ...]
    learned: frozenset[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tape:
    """What ``forward`` saves: the way back, and the data at each tap."""

    pull: Any
    xs: list[Array]
    facts: _Facts = dataclasses.field(metadata={"static": True})


class _Example:
    """The function of one example, traced."""

    def __init__(
        self, program: Program, leaves: list[Any], learned: frozenset[int], structure: Any
    ):
        self.program, self.leaves, self.learned = program, leaves, learned
        self.structure = structure
        self.owned: set[int] = set()

    @classmethod
    def of(cls, layer: Function, params: Params, x: PyTree) -> _Example:
        leaves, structure = jax.tree.flatten(params, is_leaf=is_not_learned)
        learned = frozenset(
            index
            for index, leaf in enumerate(leaves)
            if not is_not_learned(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        )
        leaves = jax.tree.leaves(arrays(params))
        alone = [jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in jax.tree.leaves(x)]
        of_x, of_params = jax.tree.structure(x), jax.tree.structure(arrays(params))
        found: list[Any] = []

        def flat(leaves: list[Any], xs: list[Any]) -> list[Any]:
            y = layer.fn(jax.tree.unflatten(of_params, leaves), jax.tree.unflatten(of_x, xs))
            outs, structure = jax.tree.flatten(y)
            found.append(structure)
            return outs

        closed = jax.make_jaxpr(flat)(list(map(struct, leaves)), alone)
        one = cls(Program.of(closed), leaves, learned, found[-1])
        taps = Taps()
        jax.eval_shape(lambda xs: one._run(taps, None, xs), [struct(a) for a in alone])
        one.uses, one.zeros = tuple(taps.uses), taps.zeros
        return one

    def run(self, zeros: Any, owns: Any, xs: list[Array]) -> tuple[list[Array], list[Array]]:
        taps = Taps(zeros)
        outs = self._run(taps, owns, [leaf[None] for leaf in xs])
        return [out.reshape(out.shape[1:]) for out in outs], taps.xs

    def _run(self, taps: Taps, owns: Any, xs: list[Array]) -> list[Array]:
        args: list[Any] = list(self.leaves)
        for index in self.learned:
            args[index] = self._view(index, owns)
        return list(map(plain, run(self.program, [*args, *xs], taps)))

    def _view(self, index: int, owns: Any) -> View:
        leaf = self.leaves[index]

        def own() -> Array:
            self.owned.add(index)
            return leaf if owns is None else leaf + owns[index]

        return View((Part(index, ()),), leaf, own)


def function(fn: Callable[..., PyTree], init: Callable[..., Params] | None = None) -> Function:
    return Function(fn, init)
