"""The base classes of layers made of layers, and functions that iterate over the layers inside."""

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
    """A layer made of layers: it defines ``walk``; ``backward`` is the walk that keeps d_params.

    ``children`` lists these layers in the order in which they run, each with the place of its
    params. Side inputs, the check of params, ``jp.cast``, and the order in which ``jp.explain`` and
    ``jp.find_nonfinite`` report the layers are derived from it. By default the children are the
    layers in the fields, in order, and params are a tuple with an entry for each; for a single
    layer in a field, params are that layer's own. If that does not hold, write ``children``:

        def children(self):
            return (jp.Child(self.gate, "gate"), jp.Child(self.block, "block", times=self.times))

    A walk through a child with ``times`` is a scan over its stacked params. Pass the results that
    the scan stacks through ``jp.over_layers``.
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
        """Check the children's places and stacks; each child checks its params by its own ``init``.

        Raises:
            ValueError: for a child without a place in params, or a child that runs several times
                and whose arrays are not stacks with an entry for each time.
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
    """Return a walk's results as a combinator must, from the stack that a scan over layers made.

    A ``Total`` is added up over the layers, and a form becomes a ``Repeated`` form.

    Args:
        visited: the walk's results for the layers, stacked on a leading axis.
    """

    def is_one(node: object) -> bool:
        return is_factored(node) or isinstance(node, Total)

    def of_stack(node: Any) -> Any:
        if isinstance(node, Total):
            return jax.tree.map(lambda leaf: leaf.sum(axis=0), node)
        return Repeated(node) if is_factored(node) else node

    return jax.tree.map(of_stack, visited, is_leaf=is_one)


class Wrapper(Layer):
    """A layer around another, with the inner layer's params, checked by the inner ``init``.

    Subclass it to change what a layer does. If ``forward`` saves more than the inner layer's
    residuals, write ``inside`` to say where these are.

    Attributes:
        layer: the inner layer.
        transparent: whether the wrapper changes only the dtype or the place of the arrays that
            pass through, so that ``jp.explain`` shows the inner layer.
    """

    layer: Layer
    transparent: ClassVar[bool] = False
    hands_down_types = True

    def __post_init__(self) -> None:
        require(self.layer, Layer, f"{type(self).__name__.lower()}: the layer")

    def children(self) -> tuple[Child, ...]:
        return (Child(self.layer, None),)

    def init(self, key: Array, x: PyTree) -> Params:
        return self.layer.init(key, x)

    def check_params(self, params: Params, x: PyTree) -> None:
        """Leave the check to the inner layer."""

    def inside(self, residuals: Residuals) -> tuple[Layer, Residuals]:
        """Return the inner layer, and its own residuals among these."""
        return self.layer, residuals

    def rounded(self, params: Params, dtype: Any) -> Params:
        return self.layer.rounded(params, dtype)


def seen_through(layer: Layer) -> Layer:
    """Return the layer inside any transparent wrappers."""
    while isinstance(layer, Wrapper) and layer.transparent:
        layer = layer.layer
    return layer


class Run(NamedTuple):
    """One run of a layer in the forward pass.

    Attributes:
        names: the path to its params in the net's params, a name for each level.
        turn: its index in the stack of each ``repeat`` around it.
        layer: the layer.
    """

    names: tuple[int | str, ...]
    turn: tuple[int, ...]
    layer: Layer


def runs(net: Layer) -> Iterator[Run]:
    """Yield each layer that a walk visits, in the order of the forward pass.

    A layer in a ``repeat`` is yielded once for each time that it runs.
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
    """Return, for each learned param, how many ``repeat`` enclose it: its number of layer axes."""
    depths = jax.tree.map(lambda _: depth, learned(params))
    if isinstance(net, Combinator):
        net.check_places(params)
        for child in net.children():
            deeper = depth + (child.times is not None)
            inner = stack_depths(child.layer, child.of(params), deeper)
            depths = child.put(depths, inner)
    return depths


def holds_stacks(layer: Layer) -> bool:
    """Return whether any layer inside has stacked params, as a layer in a ``repeat`` has."""
    children = (child for each in layers_within(layer) for child in each.children())
    return any(child.times is not None for child in children)


def map_children(layer: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """Return the layer with each layer in its fields replaced by ``f(inner)``."""

    def mapped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(mapped, value))
        return f(value) if isinstance(value, Layer) else value

    names = [field.name for field in dataclasses.fields(layer)]  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(layer, **{name: mapped(getattr(layer, name)) for name in names})


def map_layers(net: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """Return the net with each layer that a walk visits replaced by ``f(layer)``."""
    if isinstance(net, Combinator):
        return map_children(net, lambda layer: map_layers(layer, f))
    return f(net)


@contextmanager
def in_layer(name: int | str, layer: Layer) -> Iterator[None]:
    """Name the layer in errors that arise in it, and in the operations of profiles and HLO."""
    try:
        with jax.named_scope(f"{name}.{type(layer).__name__}"):
            yield
    except Exception as error:
        error.add_note(f"in layer {name}: {layer}")
        raise
