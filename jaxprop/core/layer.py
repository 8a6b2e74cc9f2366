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
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.core.arrays import rounded
from jaxprop.core.describe import shapes, structs
from jaxprop.core.static import Static
from jaxprop.core.step import Step, Visit, params_of
from jaxprop.core.tree import Key, Mask, SideInput, arrays, bare, typed
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Layer(Static):
    """A differentiable function (params, x) -> y that carries its own vector-Jacobian product.

    Subclass it, name the static configuration as fields, and write ``forward`` and ``backward``,
    and ``init`` where there are params. It becomes a frozen dataclass by itself; no decorator.
    No field holds an array: arrays live in params.

        class Scale(jp.Layer):
            def init(self, key, x):
                return jnp.ones(x.shape[-1], x.dtype)

            def forward(self, params, x):
                return x * params, x

            def backward(self, params, x, ct):
                return jp.Sum(ct * x), ct * params

    ``jp.check_layer(Scale(), x)`` then holds ``backward`` against ``jax.vjp`` of ``forward``.

    An array that is not learned is marked in ``init``: ``jp.Unlearned(matrix)``. ``forward`` and
    ``backward`` are given the array itself, and ``d_params`` has ``()`` in its place.

    ``forward`` is held to ``init``: before it runs, the structure and shapes of its params are
    compared with those that ``init`` would make for x, and a difference raises ``ValueError``
    naming the layer, the leaf and both shapes. Shapes are static, so under ``jit`` this happens
    while tracing and costs nothing afterwards.

    Attributes:
        takes: the side input, ``jp.Key`` or ``jp.Mask``, that a step may put in the place of the
            layer's params ``()``. ``forward`` and ``backward`` find it there.
    """

    takes: ClassVar[type[SideInput] | None] = None
    _hands_down_types: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward, backward = vars(cls).get("forward"), vars(cls).get("backward")
        if forward is not None and not getattr(forward, "__isabstractmethod__", False):
            cls.forward = _held_to_init(forward)
        if backward is not None and not getattr(backward, "__isabstractmethod__", False):
            cls.backward = _of_arrays(backward)

    def init(self, key: Array, x: PyTree) -> Params:
        """Return params for inputs like x.

        Args:
            key: a key of ``jax.random.key``.
            x: an input, or its ``jax.ShapeDtypeStruct``.

        Returns:
            A pytree of arrays; ``()`` where there are none.
        """
        del key, x
        return ()

    @abc.abstractmethod
    def forward(self, params: Params, x: PyTree, /) -> tuple[PyTree, Residuals]:
        """Return ``(y, residuals)``; residuals are arrays whose axis 0 is the example."""

    @abc.abstractmethod
    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent, /
    ) -> tuple[Cotangent, Cotangent]:
        """Return ``(d_params, d_x)``, pulled back from the cotangent of y.

        ``d_params`` has the structure of params, with a form or an array where an array is learned
        and ``()`` for whatever is not. d_x has the shape and dtype of x; it is None for integers.
        """

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        """Return ``(visit(step), d_x)``: ``backward``, with the visit's result for d_params.

        A layer made of layers hands ``visit`` down, so that whatever is asked for is taken at each
        layer as soon as its cotangents exist, and nothing else is kept.

        Args:
            place: the params, or what a ``Placed`` visit keeps in their place.
            residuals: what ``forward`` saved.
            ct: the cotangent of y.
            visit: a function of a ``Step``.
        """
        params = params_of(place, visit)
        d_params, d_x = self.backward(params, residuals, ct)
        return visit(Step.of(self, params, residuals, ct, d_params, d_x, place)), d_x

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        """Return params for inputs like x, and the output as ``jax.ShapeDtypeStruct``."""
        params = self.init(key, x)
        y, _ = jax.eval_shape(self.forward, params, structs(x))
        return params, y

    def children(self) -> tuple[Child, ...]:
        """Return the layers that this one is made of, in the order in which they run.

        By default these are the layers in its fields, in order. Only a ``Combinator`` or a
        ``Wrapper`` says where their params stand.
        """
        return tuple(Child(layer, ...) for layer in layers_in_fields(self))

    @property
    def batch_coupled(self) -> bool:
        """Whether an example's y depends on the batch's other examples.

        It then has no gradient of its own, and per-example quantities raise. A layer that couples
        them says so (``batch_coupled = True``, or a property); one that holds another is asked.
        """
        return any(child.layer.batch_coupled for child in self.children())

    def bind(
        self, params: Params, *, key: Array | None = None, mask: Array | None = None
    ) -> Params:
        """Return params with the side inputs of a step, each in the place of a layer that takes it.

        ``Dropout`` finds a key there and ``Attention`` a mask, where otherwise their params are
        ``()``. Every layer gets a key of its own, those inside ``repeat`` too. Gradients have the
        structure of the params without them.

        Args:
            params: the net's params.
            key: a key of ``jax.random.key``, a new one for each step.
            mask: bool (N, T), True where a position is real.

        Raises:
            TypeError: for another kind of key, or a mask that is not an array of bools.
            ValueError: if a layer that takes one of them lies in a layer that does not say where
                its params stand.
        """
        _check_side_inputs(key, mask)
        if self.takes is Key and key is not None:
            return Key(key)
        if self.takes is Mask and mask is not None:
            return Mask(mask)
        if key is None and mask is None:
            return params
        self.check_places(params)
        for index, child in enumerate(self.children()):
            params = _bind_child(self, params, index, child, key, mask)
        return params

    def rounded(self, params: Params, dtype: Any) -> Params:
        """Return params as ``jp.cast`` computes with them: floating ones in dtype."""
        return rounded(params, dtype)

    def check_params(self, params: Params, x: PyTree) -> None:
        """Raise ``ValueError`` unless params are of the structure and shapes that init makes."""
        expected = _expected(self, x)
        leaves, structure = jax.tree.flatten(params)
        if structure != expected.structure:
            leaves, structure = jax.tree.flatten(bare(params))
        if structure != expected.structure:
            hint = " (does it define init?)" if expected.params == () else ""
            raise ValueError(
                f"{self}: params are {shapes(params)}, "
                f"but an input {shapes(x)} takes {shapes(expected.params)}{hint}"
            )
        for (path, want), got in zip(expected.leaves, leaves, strict=True):
            if getattr(got, "shape", None) != want and jnp.shape(got) != want:
                raise ValueError(
                    f"{self}: params{jax.tree_util.keystr(path)} has shape {jnp.shape(got)}, "
                    f"but an input {shapes(x)} takes {want}"
                )

    def check_places(self, params: Params) -> None:
        """Raise ``ValueError`` unless every child whose place is known has one in params."""


class Child(NamedTuple):
    """A layer within a layer.

    Attributes:
        layer: the layer.
        name: where its params stand among those of the layer around it: the index in a tuple, the
            key of a dict, or the name of a field; None where they are the same, and ``...`` where
            only the layer around it knows.
        times: how often it runs, with its params stacked along axis 0; None for a layer that runs
            once.
    """

    layer: Layer
    name: int | str | EllipsisType | None
    times: int | None = None

    def of(self, params: Params) -> Params:
        """Return the child's part of the params of the layer around it."""
        if self.name is None:
            return params
        if isinstance(self.name, str) and not isinstance(params, dict):
            return getattr(params, self.name)
        return params[self.name]

    def put(self, params: Params, new: Params) -> Params:
        """Return the params of the layer around it with ``new`` in the child's place."""
        if self.name is None:
            return new
        if isinstance(params, dict):
            return {**params, self.name: new}
        if isinstance(self.name, str):
            replace = getattr(params, "_replace", None) or functools.partial(
                dataclasses.replace, params
            )
            return replace(**{self.name: new})
        return (*params[: self.name], new, *params[self.name + 1 :])  # pyright: ignore


def layers_in_fields(layer: Layer) -> Iterator[Layer]:
    """Yield the layers in a layer's fields, and in tuples there."""

    def within(value: object) -> Iterator[Layer]:
        if isinstance(value, Layer):
            yield value
        elif isinstance(value, tuple):
            for each in value:
                yield from within(each)

    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        yield from within(getattr(layer, field.name))


def takes_side_input(layer: Layer, kind: type[SideInput]) -> bool:
    """Return whether the layer, or one that it is made of, takes this side input."""
    return layer.takes is kind or any(
        takes_side_input(child.layer, kind) for child in layer.children()
    )


def _check_side_inputs(key: Array | None, mask: Array | None) -> None:
    dtype = getattr(key, "dtype", None)
    if key is not None and (dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key is a key of jax.random.key, not {shapes(key)}")
    if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
        raise TypeError(f"mask is bool (N, T), True where a position is real, not {shapes(mask)}")


def _bind_child(
    layer: Layer, params: Params, index: int, child: Child, key: Array | None, mask: Array | None
) -> Params:
    if child.name is ...:
        given = {Key: key, Mask: mask}
        for kind, value in given.items():
            if value is not None and takes_side_input(child.layer, kind):
                raise ValueError(
                    f"{layer}: {child.layer} takes a {kind.__name__.lower()}, but where its params "
                    "stand is not known; make the layer a jp.Wrapper or a jp.Combinator"
                )
        return params
    if key is not None and child.name is not None:
        key = _each(lambda key: jax.random.fold_in(key, index), key)
    times = child.times
    if times is not None:
        if key is not None:
            key = _each(lambda key: jax.random.split(key, times), key)
        if mask is not None:
            *layers, n, t = mask.shape
            mask = jnp.broadcast_to(jnp.expand_dims(mask, -3), (*layers, times, n, t))
    return child.put(params, child.layer.bind(child.of(params), key=key, mask=mask))


def _each(f: Callable[[Array], Array], keys: Array) -> Array:
    """Return f of each of the keys, in their shape."""
    for _ in keys.shape:
        f = jax.vmap(f)
    return f(keys)


def _held_to_init(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def held(self: Layer, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        self.check_params(params, x)
        x = x if isinstance(x, Array) else jax.tree.map(_on_device, x)
        if not self._hands_down_types and typed(jax.tree.structure(params)):
            params = arrays(params)
        result = forward(self, params, x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{self}: forward returns {shapes(result)}, not (y, residuals)")
        return result

    return held


def _of_arrays(backward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def of(self: Layer, params: Params, residuals: Residuals, ct: Cotangent) -> Any:
        if not self._hands_down_types and typed(jax.tree.structure(params)):
            params = arrays(params)
        return backward(self, params, residuals, ct)

    return of


def _on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


class _Expected(NamedTuple):
    """The params that ``init`` makes, without types: as structs, and what a check compares."""

    params: Params
    structure: Any
    leaves: tuple[tuple[Any, tuple[int, ...]], ...]


def _expected(layer: Layer, x: PyTree) -> _Expected:
    try:
        leaves, structure = jax.tree.flatten(structs(x))
    except TypeError as error:
        raise TypeError(f"{layer}: {error}") from None
    try:
        hash(layer)
    except TypeError:
        _refuse_fields(layer)
    return _init_shapes(layer, structure, tuple(leaves))


@functools.lru_cache(maxsize=1024)
def _init_shapes(layer: Layer, structure: Any, leaves: tuple[Any, ...]) -> _Expected:
    params = bare(
        jax.eval_shape(
            lambda *leaves: layer.init(jax.random.key(0), jax.tree.unflatten(structure, leaves)),
            *leaves,
        )
    )
    shaped = tuple((path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(params))
    return _Expected(params, jax.tree.structure(params), shaped)


def _refuse_fields(layer: Layer) -> None:
    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        value = getattr(layer, field.name)
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{type(layer).__name__}.{field.name} = {value!r} cannot be hashed; arrays live in "
                "params, and a list is written as a tuple"
            ) from None
