"""Layers made of layers: what they declare, and what follows from it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.checks import require
from jaxprop.core.child import Child, layers_within
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Repeated, is_factored
from jaxprop.core.layer import Layer, layers_in_fields
from jaxprop.core.step import Total, Visit
from jaxprop.core.tree import learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Combinator(Layer):
    """A layer made of layers: it writes ``walk``, and ``backward`` is the walk that keeps all.

    ``children`` says which layers those are, in the order in which they run, and where their params
    stand. Side inputs, the check of params, ``jp.cast``, and the order in which ``jp.explain`` and
    ``jp.find_nonfinite`` go through the layers follow from it. By default the children are the
    layers in the fields, in order: params are a tuple with an entry for each, or for a single layer
    its own params. Where that is not so, write ``children``:

        def children(self):
            return (jp.Child(self.gate, "gate"), jp.Child(self.block, "block", times=self.times))

    A walk through a child with ``times`` is a scan over its stacked params, and what that scan
    stacks goes through ``jp.over_layers``.
    """

    hands_down_types = True

    def children(self) -> tuple[Child, ...]:
        layers = tuple(layers_in_fields(self))
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        if len(layers) == 1 and any(getattr(self, field.name) is layers[0] for field in fields):
            return (Child(layers[0], None),)
        return tuple(Child(layer, index) for index, layer in enumerate(layers))

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent, /
    ) -> tuple[Cotangent, Cotangent]:
        return self.walk(params, residuals, ct, lambda step: step.d_params)

    @abc.abstractmethod
    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]: ...

    def check_params(self, params: Params, x: PyTree) -> None:
        """Check the places, and the stacks; the children hold their params to their own ``init``.

        Raises:
            ValueError: for a child without a place in params, or one that runs several times whose
                arrays are not stacks with an entry for each time.
        """
        self.check_places(params)
        for child in self.children():
            if child.times is not None:
                _check_stack(self, child.of(params), child.times)

    def check_places(self, params: Params) -> None:
        """Raise ``ValueError`` unless every child has its place in params."""
        for child in self.children():
            if child.name is ...:
                raise ValueError(
                    f"{self}: children() does not say where the params of {child.layer} stand; "
                    "name the place in its jp.Child"
                )
            try:
                child.of(params)
            except (AttributeError, IndexError, KeyError, TypeError):
                raise ValueError(
                    f"{self}: params are {shapes(params)}, where {child.layer} has no place "
                    f"{child.name!r}"
                ) from None


def _check_stack(layer: Layer, params: Params, times: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.shape(leaf)[:1] != (times,):
            raise ValueError(
                f"{layer}: params{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but "
                f"axis 0 is the layer, and there are {times}"
            )


def over_layers(visited: Visited) -> Visited:
    """Return what a scan over layers has stacked of a walk, as a combinator hands it on.

    A ``Total`` is added up over the layers, and a form becomes a ``Repeated`` one.

    Args:
        visited: what a walk returned for each layer, behind an axis of layers.
    """

    def is_one(node: object) -> bool:
        return is_factored(node) or isinstance(node, Total)

    def of_stack(node: Any) -> Any:
        if isinstance(node, Total):
            return jax.tree.map(lambda leaf: leaf.sum(axis=0), node)
        return Repeated(node) if is_factored(node) else node

    return jax.tree.map(of_stack, visited, is_leaf=is_one)


class Wrapper(Layer):
    """A layer around another, whose params are the inner one's, and are held to *its* ``init``.

    Subclass it to change what a layer does. If ``forward`` saves more than the inner layer's
    residuals, ``inside`` says where those are.

    Attributes:
        layer: the layer within.
        transparent: whether the wrapper only changes the dtype or the place of what passes through,
            so that ``jp.explain`` shows the layer within.
    """

    layer: Layer
    transparent: ClassVar[bool] = False
    hands_down_types = True

    def __post_init__(self) -> None:
        require(self.layer, Layer, type(self).__name__.lower())

    def children(self) -> tuple[Child, ...]:
        return (Child(self.layer, None),)

    def init(self, key: Array, x: PyTree) -> Params:
        return self.layer.init(key, x)

    def check_params(self, params: Params, x: PyTree) -> None:
        """Leave the check to the inner layer."""

    def inside(self, residuals: Residuals) -> tuple[Layer, Residuals]:
        """Return the layer within, and what it saved among these residuals."""
        return self.layer, residuals

    def rounded(self, params: Params, dtype: Any) -> Params:
        return self.layer.rounded(params, dtype)


def seen_through(layer: Layer) -> Layer:
    """Return the layer within, where transparent wrappers stand around it."""
    while isinstance(layer, Wrapper) and layer.transparent:
        layer = layer.layer
    return layer


class Run(NamedTuple):
    """One layer as the way forward comes to it.

    Attributes:
        names: where its params stand in those of the net, a name for each level.
        turn: which layer of a stack, for each ``repeat`` around it.
        layer: the layer.
    """

    names: tuple[int | str, ...]
    turn: tuple[int, ...]
    layer: Layer


def runs(net: Layer) -> Iterator[Run]:
    """Yield each layer that a walk visits, in the order in which the way forward comes to it.

    A layer in a ``repeat`` comes as often as it runs.
    """
    if not isinstance(net, Combinator):
        yield Run((), (), net)
        return
    for child in net.children():
        here = () if child.name is None or child.name is ... else (child.name,)
        inner = list(runs(child.layer))
        for i in [None] if child.times is None else range(child.times):
            turn = () if i is None else (i,)
            for run in inner:
                yield Run((*here, *run.names), (*turn, *run.turn), run.layer)


def stack_depths(net: Layer, params: Params, depth: int = 0) -> PyTree:
    """Return, for each learned param, in how many ``repeat`` its layer lies: its axes of layers."""
    depths = jax.tree.map(lambda _: depth, learned(params))
    if isinstance(net, Combinator):
        net.check_places(params)
        for child in net.children():
            deeper = depth + (child.times is not None)
            inner = stack_depths(child.layer, child.of(params), deeper)
            depths = child.put(depths, inner)
    return depths


def holds_stacks(layer: Layer) -> bool:
    """Return whether the params of some layer within are stacked, as those in a ``repeat`` are."""
    children = (child for each in layers_within(layer) for child in each.children())
    return any(child.times is not None for child in children)


def map_children(layer: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """Return the same layer with ``f(inner)`` for every layer that it holds in its fields."""

    def mapped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(mapped, value))
        return f(value) if isinstance(value, Layer) else value

    names = [field.name for field in dataclasses.fields(layer)]  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(layer, **{name: mapped(getattr(layer, name)) for name in names})


def map_layers(net: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """Return the same net with ``f(layer)`` for every layer that a walk visits."""
    if isinstance(net, Combinator):
        return map_children(net, lambda layer: map_layers(layer, f))
    return f(net)


@contextmanager
def in_layer(name: int | str, layer: Layer) -> Iterator[None]:
    """Say in which layer an error arose, and name its operations so in profiles and HLO."""
    try:
        with jax.named_scope(f"{name}.{type(layer).__name__}"):
            yield
    except Exception as error:
        error.add_note(f"in layer {name}: {layer}")
        raise
