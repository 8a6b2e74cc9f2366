"""The chain-rule terms of one walk through a network, as values."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.checks import given
from jaxprop.core.forms import is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Cotangent, Params, PyTree, Visited
from jaxprop.explanation.chain import Product, product_of
from jaxprop.explanation.order import in_order
from jaxprop.explanation.summary import Summary
from jaxprop.traced.function import Function

if TYPE_CHECKING:
    from rich.console import Group

T = TypeVar("T")


class Summaries(NamedTuple):
    """A ``Summary`` of each array of a layer, None where there is no array.

    Attributes:
        x: a summary of the input.
        y: a summary of the output.
        ct: a summary of the cotangent of y.
        d_x: a summary of the cotangent of x.
        params: a tree like the learned params, with a summary of each.
        unlearned: a tree like the params, with a summary of each that is not learned.
        grads: a tree like the learned params, with a summary of each gradient.
        saturated: for an elementwise layer, the fraction of elements whose local derivative is
            below 0.01 in absolute value.
        dead: for an elementwise layer, the fraction of units, along the last axis, whose local
            derivative is 0 for every example.
    """

    x: Summary | None
    y: Summary | None
    ct: Summary | None
    d_x: Summary | None
    params: PyTree
    unlearned: PyTree
    grads: PyTree
    saturated: Array | None
    dead: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scope:
    """The terms of one named scope of a function, such as a module of Flax.

    Attributes:
        name: the scope's name, with the layer's number in a scan over layers, such as "Block[1]".
            Outside any scope it is the source line.
        line: the source line.
        params: the names of the params that are used in it.
        y: a summary of the scope's result: the last one that is used outside the scope.
        ct: a summary of that result's cotangent, for each example's own loss.
        grads: a summary of the gradients of its params; None without any. The gradient of a param
            that is also used elsewhere is that of all its uses.
        kept: the result and its cotangent, with the example on axis 0; None if only summaries were
            kept.
    """

    name: str = dataclasses.field(metadata={"static": True})
    line: str = dataclasses.field(metadata={"static": True})
    params: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    y: Summary
    ct: Summary
    grads: Summary | None
    kept: tuple[Array, Array] | None


class Kept(NamedTuple):
    """The whole arrays of one layer.

    Attributes:
        x: the input.
        y: the output.
        ct: the cotangent of y, for each example's own loss.
        slope: the local derivative dy/dx of an elementwise layer, None for any other.
        d_x: the cotangent of x, for each example's own loss.
        params: the learned params.
        forms: each example's own cotangent of each param, factored; None for a layer that couples
            the examples of a batch.
        grads: the gradients of the mean over examples.
    """

    x: PyTree
    y: PyTree
    ct: Cotangent
    slope: Array | None
    d_x: Cotangent
    params: Params
    forms: Cotangent
    grads: Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of one layer, or of the loss.

    The fields of ``kept`` can be read from the terms themselves: ``terms.layers["1"].slope``. For a
    layer in a ``repeat`` every array has a leading axis of turns.

    Attributes:
        layer: the layer, or the loss.
        summaries: a summary of each array.
        kept: the whole arrays; None if only summaries were kept. Then reading one of its fields
            raises ``ValueError``.
        scopes: the terms of each named scope of a function, in the order of the forward pass.
    """

    layer: Layer | Loss = dataclasses.field(metadata={"static": True})
    summaries: Summaries
    kept: Kept | None
    scopes: tuple[Scope, ...] = ()

    def __getattr__(self, name: str) -> PyTree:
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
        """The lengths of the axes of turns; ``()`` for a layer outside of any ``repeat``."""
        first = next(s for s in self.summaries[:4] if s is not None)
        return first.mean.shape


@dataclasses.dataclass(frozen=True)
class Param:
    """One param in an explanation; ``param[0, 1]`` is the chain rule for that weight.

    Attributes:
        name: its name, such as "2.0.w".
        terms: the terms of its layer.
        position: its index among the layer's params.
        example: the example that is in view.
    """

    name: str
    terms: Terms
    position: int
    example: int

    @property
    def value(self) -> Array:
        """The param itself."""
        return jax.tree.leaves(self.terms.params)[self.position]

    @property
    def grad(self) -> Array:
        """The gradient of the mean over examples, as ``jax.grad`` returns it."""
        return jax.tree.leaves(self.terms.grads)[self.position]

    def __getitem__(self, index: int | tuple[int, ...]) -> Product:
        """Return the chain rule for the weight at an index.

        Raises:
            IndexError: if the param has no entry at the index.
            TypeError: if the index is not made of whole numbers.
            ValueError: if the layer couples the examples of a batch, or if only summaries were
                kept.
        """
        forms = self.terms.forms
        if forms is None:
            raise ValueError(
                f"{self.terms.layer} couples the examples of a batch: an example has no chain of "
                "its own"
            )
        place = self._checked(index)
        form = jax.tree.leaves(forms, is_leaf=is_factored)[self.position]
        factors, product = product_of(form, self.terms.ct, self.example, place)
        if isinstance(self.terms.layer, Function):  # its forms keep an axis for a single position
            factors = {name: f.reshape(()) if f.size == 1 else f for name, f in factors.items()}
        return Product(factors, product)

    def _checked(self, index: int | tuple[int, ...]) -> tuple[int, ...]:
        each = index if isinstance(index, tuple) else (index,)
        place = tuple(_whole(i, f"{self.name}: an index along an axis") for i in each)
        shape = jnp.shape(self.value)
        if len(place) != len(shape) or not all(
            -size <= i < size for i, size in zip(place, shape, strict=True)
        ):
            raise IndexError(f"{self.name}[{', '.join(map(str, place))}]: its shape is {shape}")
        return tuple(i % size for i, size in zip(place, shape, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The chain-rule terms of one walk, as ``jp.explain`` returns them.

    ``explanation["2.0.w"]`` is a param by its name, and ``explanation.example(n)`` the same
    explanation with example n in view.

    Attributes:
        net: the network.
        value: the loss, as the mean over examples.
        collected: the terms of each layer, in the structure of the net's params.
        loss: the terms of the loss: its x is the net's output, its y the value of each example.
        shown: the example that is in view.
    """

    net: Layer = dataclasses.field(metadata={"static": True})
    value: Array
    collected: Visited
    loss: Terms
    shown: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def layers(self) -> dict[str, Terms]:
        """The terms of each layer, by the place of its params, such as "2.0"."""
        return by_name(self.collected, Terms)

    @property
    def names(self) -> list[str]:
        """The names of the params, such as "2.0.w"."""
        return [name for name, _, _ in self._params()]

    @property
    def examples(self) -> int:
        """The number of examples in the batch."""
        assert self.loss.summaries.y is not None
        return self.loss.summaries.y.shape[0]

    def example(self, n: int) -> Explanation:
        """Return the same explanation, indexed and printed for example n.

        Raises:
            IndexError: if the batch has no example n.
            TypeError: if n is not a whole number.
        """
        n = _whole(n, "the number of an example")
        if not -self.examples <= n < self.examples:
            raise IndexError(f"example {n}: there are {self.examples}")
        return dataclasses.replace(self, shown=n % self.examples)

    def __getitem__(self, name: str) -> Param:
        """Return a param by its name; raise ``KeyError`` for a name that no param has.

        The name of a function's param is its path, such as "params/Dense_0/kernel", after the place
        of the function, if it has one, such as "1.params/Dense_0/kernel".
        """
        for known, terms, position in self._params():
            if name in (known, known.replace("/", ".")):
                return Param(known, terms, position, self.shown)
        there = f"there are {', '.join(self.names)}" if self.names else "no param is learned"
        raise KeyError(f"no param that is learned is called {name!r}; {there}")

    def runs(self) -> list[tuple[str, Terms]]:
        """Return the name and the terms of each layer, in the order of the forward pass.

        A layer in a ``repeat`` comes once for each turn, with the turn in its name: "2.0[3]".
        """
        return list(in_order(self.net, self.layers))

    def _params(self) -> list[tuple[str, Terms, int]]:
        """Return each param's name, its layer's terms, and its index among the layer's params."""
        return [
            (".".join(filter(None, (seat, name))), terms, position)
            for seat, terms in self.layers.items()
            for position, name in enumerate(
                by_name(terms.summaries.params, Summary, _separator(terms.layer))
            )
        ]

    def __rich__(self) -> Group:
        from jaxprop.explanation import table  # imports rich, which takes time

        return table.table(self)

    def __repr__(self) -> str:
        from jaxprop.explanation import table

        return table.plainly(self)


def _whole(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a whole number, not {given(value)}") from None


def by_name(tree: PyTree, kind: type[T], separator: str = ".") -> dict[str, T]:
    """Return the nodes of a class in the tree, by their place in it, such as "2.0.w"."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind))
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf
        for path, leaf in leaves
        if isinstance(leaf, kind)
    }


def _separator(layer: Layer | Loss) -> str:
    """Return the separator between the names in the path of a layer's param."""
    return "/" if isinstance(layer, Function) else "."
