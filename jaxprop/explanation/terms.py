"""The chain-rule terms of one walk, as values."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.forms import Outer, Repeated, Sum, is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Visited
from jaxprop.explanation.order import in_order
from jaxprop.explanation.summary import Summary


class Summaries(NamedTuple):
    """A layer in a few numbers: a ``Summary`` of each of its arrays, None where there is none.

    Attributes:
        x: its input.
        y: its output.
        ct: the cotangent of y.
        d_x: the cotangent of x.
        params: like the layer's learned params.
        unlearned: like the layer's params, of those that are not learned.
        grads: like the learned params.
        saturated: of an elementwise layer, the share of elements whose local derivative is below
            0.01 in size.
        dead: of an elementwise layer, the share of units, along the last axis, whose local
            derivative is 0 for every example.
    """

    x: Summary | None
    y: Summary | None
    ct: Summary | None
    d_x: Summary | None
    params: Any
    unlearned: Any
    grads: Any
    saturated: Array | None
    dead: Array | None


class Kept(NamedTuple):
    """What passed through one layer, whole.

    ``slope`` is the local derivative dy/dx of an elementwise layer, None for any other. ``forms``
    holds each example's own cotangent of each param, factored; None where the layer couples the
    examples of a batch. ``grads`` is the mean over the examples.
    """

    x: Any
    y: Any
    ct: Any
    slope: Any
    d_x: Any
    params: Any
    forms: Any
    grads: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """One layer (or the loss): x and y on the way there, ct and d_x on the way back.

    The fields of ``Kept`` are attributes: ``terms.layers["1"].slope``. Inside a layer that is
    repeated all of it lies behind an axis of repetitions, ``repeats`` of them.
    """

    layer: Layer | Loss = dataclasses.field(metadata={"static": True})
    summaries: Summaries
    kept: Kept | None

    def __getattr__(self, name: str) -> Any:
        if name not in Kept._fields:
            raise AttributeError(name)
        if self.kept is None:
            raise ValueError(
                f"{self.layer}: only summaries were kept; explain(..., keep=N) keeps all that "
                "passes through a net as long as it is N numbers at most"
            )
        return getattr(self.kept, name)

    @property
    def repeats(self) -> tuple[int, ...]:
        """The lengths of the axes of repetition, none for a layer that is run once."""
        first: Any = next(s for s in self.summaries[:4] if s is not None)
        return first.mean.shape


class Product(NamedTuple):
    """The chain rule for one weight and one example: the factors, and what they make.

    Along positions (a sequence, an image) a factor is an array, and ``product`` the sum over the
    positions of the factors' product. ``factors`` is empty where a layer's cotangent is not made
    of two factors that have names.
    """

    factors: dict[str, Array]
    product: Array


@dataclasses.dataclass(frozen=True)
class Param:
    """One param in an explanation: ``param[0, 1]`` is the chain rule for that weight of it."""

    name: str
    terms: Terms
    position: int  # among the layer's params
    example: int

    @property
    def value(self) -> Array:
        return jax.tree.leaves(self.terms.params)[self.position]

    @property
    def grad(self) -> Array:
        """The mean over the examples, as ``jax.grad`` gives it."""
        return jax.tree.leaves(self.terms.grads)[self.position]

    def __getitem__(self, index: int | tuple[int, ...]) -> Product:
        forms, repeats = self.terms.forms, self.terms.repeats
        if forms is None:
            raise ValueError(
                f"{self.terms.layer} couples the examples of a batch: an example has no chain of "
                "its own"
            )
        place = self._checked(index)
        form = jax.tree.leaves(forms, is_leaf=is_factored)[self.position]
        while isinstance(form, Repeated):
            form = form.form
        at, inner = (*place[: len(repeats)], self.example), place[len(repeats) :]
        form = jax.tree.map(lambda leaf: leaf[at][None], form)
        factors: dict[str, Array] = {}
        if isinstance(form, Outer):
            factors = {"x": form.x[0][..., inner[0]], "ct": form.ct[0][..., inner[1]]}
        elif isinstance(form, Sum):
            factors = {"ct": form.ct[0][..., inner[-1]]}
        return Product(factors, form.per_example()[0][inner])

    def _checked(self, index: int | tuple[int, ...]) -> tuple[int, ...]:
        place = tuple(map(operator.index, index if isinstance(index, tuple) else (index,)))
        shape = jnp.shape(self.value)
        if len(place) != len(shape) or not all(
            -size <= i < size for i, size in zip(place, shape, strict=True)
        ):
            raise IndexError(f"{self.name}[{', '.join(map(str, place))}]: its shape is {shape}")
        return tuple(i % size for i, size in zip(place, shape, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What ``jp.explain`` returns: the terms of each layer where its params stand in the net's.

    ``value`` is the mean over examples of the loss. ``layers`` gives the ``Terms`` by the layer's
    place in the params tree, such as "2.0", in the order of the way forward; ``loss`` those of the
    loss, whose x is the net's output and whose y has a value for each example. Indexed with a
    param's name it gives that param; ``example(n)`` is the same with example n in view.
    """

    net: Layer = dataclasses.field(metadata={"static": True})
    value: Array
    collected: Visited
    loss: Terms
    shown: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def layers(self) -> dict[str, Terms]:
        return by_name(self.collected, Terms)

    @property
    def names(self) -> list[str]:
        """The params' names."""
        return [name for name, _, _ in self._params()]

    @property
    def examples(self) -> int:
        assert self.loss.summaries.y is not None
        return self.loss.summaries.y.shape[0]

    def example(self, n: int) -> Explanation:
        """The same explanation, indexed and printed for example n."""
        if not -self.examples <= n < self.examples:
            raise IndexError(f"example {n}: there are {self.examples}")
        return dataclasses.replace(self, shown=n % self.examples)

    def __getitem__(self, name: str) -> Param:
        for known, terms, position in self._params():
            if known == name:
                return Param(name, terms, position, self.shown)
        raise KeyError(f"no param is called {name!r}; there are {', '.join(self.names)}")

    def runs(self) -> list[tuple[str, Terms]]:
        """The layers in the order of the way forward, a repeated one as often as it is run.

        Each is named by its place and, where it is repeated, the repetition: "2.0[3]".
        """
        return list(in_order(self.net, self.layers))

    def _params(self) -> list[tuple[str, Terms, int]]:
        return [
            (".".join(filter(None, (seat, name))), terms, position)
            for seat, terms in self.layers.items()
            for position, name in enumerate(by_name(terms.summaries.params, Summary))
        ]

    def __rich__(self) -> Any:
        from jaxprop.explanation import table  # rich is for those who print

        return table.table(self)

    def __repr__(self) -> str:
        from jaxprop.explanation import table

        return table.plainly(self)


def by_name(tree: Any, kind: type) -> dict[str, Any]:
    """The tree's nodes of the kind, each under its place in the tree, such as "2.0.w"."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
        if isinstance(leaf, kind)
    }
