"""The contract: a layer is static configuration with a ``forward`` and, next, its ``backward``.

Words used throughout: ``ct`` is the cotangent of a layer's output y (the derivative of the loss
by y), ``d_x`` and ``d_params`` are the cotangents that ``backward`` pulls back from it, and
``residuals`` are what ``forward`` saved to do so.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxprop.seats import bare, learned, rounded
from jaxprop.shapes import shapes, structs
from jaxprop.static import Static


class Layer(Static):
    """A differentiable function (params, x) -> y that carries its own vector-Jacobian product.

    Subclass it, name the static configuration as fields, and write ``forward`` and ``backward``
    (and ``init`` where there are params). It becomes a frozen dataclass by itself; no decorator.
    No field holds an array: arrays live in params.

        class Scale(jp.Layer):
            def init(self, key, x):
                return jnp.ones(x.shape[-1], x.dtype)

            def forward(self, params, x):
                return x * params, x

            def backward(self, params, x, ct):
                return jp.Sum(ct * x), ct * params

    ``jp.check_layer(Scale(), x)`` then holds ``backward`` against ``jax.vjp`` of ``forward``.

    ``forward`` is held to ``init``: before it runs, the structure and shapes of its params are
    compared with those that ``init`` would make for x, and a difference raises ``ValueError``
    naming the layer, the leaf and both shapes. Shapes are static, so under ``jit`` this happens
    while tracing and costs nothing afterwards.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = vars(cls).get("forward")
        if forward is not None and not getattr(forward, "__isabstractmethod__", False):
            cls.forward = _held_to_init(forward)

    @property
    def batch_coupled(self) -> bool:
        """Whether an example's y depends on the batch's other examples.

        It then has no gradient of its own, and per-example quantities raise. A layer that couples
        them says so (``batch_coupled = True``, or a property); one that holds another is asked.
        """
        return any(layer.batch_coupled for layer in inner_layers(self))

    def init(self, key: chex.PRNGKey, x: Any) -> Any:
        """Params for inputs like x (an array or ``jax.ShapeDtypeStruct``); ``()`` for none."""
        del key, x
        return ()

    @abc.abstractmethod
    def forward(self, params: Any, x: Any, /) -> tuple[Any, Any]:
        """``(y, residuals)``; residuals are arrays whose axis 0 is the example."""

    @abc.abstractmethod
    def backward(self, params: Any, residuals: Any, ct: Any, /) -> tuple[Any, Any]:
        """``(d_params, d_x)`` from the cotangent of y.

        ``d_params`` has the structure of params, with a ``Factored`` cotangent or a plain array
        at each leaf; d_x has the shape and dtype of x.
        """

    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        """``backward`` that leaves behind ``leave(step)`` in the place of d_params.

        A layer made of layers hands ``leave`` down, so that whatever is asked for is taken at
        each layer as soon as its cotangents exist, and nothing else is kept.
        """
        d_params, d_x = self.backward(bare(params), residuals, ct)
        return leave(Step.at(self, params, residuals, ct, d_params, d_x)), d_x

    def given(self, params: Any, *, key: chex.PRNGKey | None = None, mask: Any = None) -> Any:
        """params with what a step is given put in the seats of the layers that take it.

        Randomness and masks are inputs like any other: ``Dropout`` finds a key in its seat and
        ``Attention`` a mask (N, T) of the positions that are real, where otherwise their params
        are ``()``. Each seat gets a key of its own, those inside ``repeat`` too. Gradients have
        the structure of the params without them.
        """
        del key, mask
        return params

    def rounded(self, params: Any, dtype: Any) -> Any:
        """params as ``jp.cast`` computes with them: floating ones in dtype."""
        return rounded(params, dtype)

    def check_params(self, params: Any, x: Any) -> None:
        """Raise ``ValueError`` unless params are of the structure and shapes that init makes."""
        expected = _expected_params(self, x)
        if jax.tree.structure(params) != jax.tree.structure(expected):
            hint = " (does it define init?)" if expected == () else ""
            raise ValueError(
                f"{self}: params are {shapes(params)}, "
                f"but an input {shapes(x)} takes {shapes(expected)}{hint}"
            )
        pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(params), strict=True)
        for (path, want), got in pairs:
            if jnp.shape(got) != want.shape:
                raise ValueError(
                    f"{self}: params{jax.tree_util.keystr(path)} has shape {jnp.shape(got)}, "
                    f"but an input {shapes(x)} takes {want.shape}"
                )


class Step(NamedTuple):
    """One layer's moment in the walk back: what came in, what came back, what it makes of them."""

    layer: Layer
    params: Any
    residuals: Any
    ct: Any
    d_params: Any
    d_x: Any
    seat: Any
    """What stands in the layer's place: its params, ``Attached`` ones as they are, and what it was
    given."""

    @classmethod
    def at(
        cls, layer: Layer, seat: Any, residuals: Any, ct: Any, d_params: Any, d_x: Any, /
    ) -> Step:
        return cls(layer, learned(bare(seat), d_params), residuals, ct, d_params, d_x, seat)


Leave = Callable[[Step], Any]


class Total(NamedTuple):
    """What ``leave`` wants added up over the layers of a ``repeat``, where all else is stacked."""

    value: Any


class Combinator(Layer):
    """A layer made of layers: it writes ``walk``, and ``backward`` is the walk that keeps all."""

    def backward(self, params: Any, residuals: Any, ct: Any, /) -> tuple[Any, Any]:
        return self.walk(params, residuals, ct, lambda step: step.d_params)

    @abc.abstractmethod
    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]: ...


def inner_layers(layer: Layer) -> Iterator[Layer]:
    """The layers that a layer holds in its fields, or in tuples there."""

    def within(value: Any) -> Iterator[Layer]:
        if isinstance(value, Layer):
            yield value
        elif isinstance(value, tuple):
            for each in value:
                yield from within(each)

    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        yield from within(getattr(layer, field.name))


def map_inner(layer: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """The same layer with ``f(inner)`` in the place of every layer that it holds."""

    def mapped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(mapped, value))
        return f(value) if isinstance(value, Layer) else value

    names = [field.name for field in dataclasses.fields(layer)]  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(layer, **{name: mapped(getattr(layer, name)) for name in names})


def map_layers(net: Layer, f: Callable[[Layer], Layer]) -> Layer:
    """The same net with ``f(layer)`` in the place of every layer that is not made of layers."""
    if isinstance(net, Combinator):
        return map_inner(net, lambda layer: map_layers(layer, f))
    return f(net)


@contextmanager
def in_layer(index: int, layer: Layer) -> Iterator[None]:
    """Say in which layer an error arose, and name its operations so in profiles and HLO."""
    try:
        with jax.named_scope(f"{index}.{type(layer).__name__}"):
            yield
    except Exception as error:
        error.add_note(f"in layer {index}: {layer}")
        raise


def _held_to_init(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def held(self: Layer, params: Any, x: Any) -> Any:
        self.check_params(params, x)
        result = forward(self, params, jax.tree.map(_on_device, x))
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{self}: forward returns {shapes(result)}, not (y, residuals)")
        return result

    return held


def _on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _expected_params(layer: Layer, x: Any) -> Any:
    _check_fields(layer)
    try:
        leaves, structure = jax.tree.flatten(structs(x))
    except TypeError as error:
        raise TypeError(f"{layer}: {error}") from None
    return _init_shapes(layer, structure, tuple(leaves))


@functools.lru_cache(maxsize=1024)
def _init_shapes(layer: Layer, structure: Any, leaves: tuple[Any, ...]) -> Any:
    return jax.eval_shape(
        lambda *leaves: layer.init(jax.random.key(0), jax.tree.unflatten(structure, leaves)),
        *leaves,
    )


def _check_fields(layer: Layer) -> None:
    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        value = getattr(layer, field.name)
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{type(layer).__name__}.{field.name} = {value!r} cannot be hashed; arrays live in "
                "params, and a list is written as a tuple"
            ) from None
