"""The contract: a layer is static configuration with a ``forward`` and, next to it, a ``backward``.

Words used throughout: ``ct`` is the cotangent of a layer's output y (the derivative of the loss
with respect to y). ``backward`` pulls it back to ``d_x`` and ``d_params``, the cotangents of x and
params. ``residuals`` are the arrays that ``forward`` saves for this.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
from jax import Array

from jaxprop.core.arrays import rounded
from jaxprop.core.checks import require
from jaxprop.core.child import Child
from jaxprop.core.contract import check_params, held_to_init, held_to_key, held_to_pair
from jaxprop.core.describe import structs
from jaxprop.core.side_inputs import bound, check_side_inputs
from jaxprop.core.static import Static
from jaxprop.core.step import Step, Visit, params_of
from jaxprop.core.tree import Mask, SideInput, map_modules
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Layer(Static):
    """A differentiable function (params, x) -> y that carries its own vector-Jacobian product.

    Subclass it, declare the static configuration as fields, and write ``forward`` and ``backward``,
    and ``init`` if there are params. The subclass becomes a frozen dataclass without a decorator.
    No field holds an array: arrays live in params.

        class Scale(jp.Layer):
            def init(self, key, x):
                return jnp.ones(x.shape[-1], x.dtype)

            def forward(self, params, x):
                return x * params, x

            def backward(self, params, x, ct):
                return jp.Sum(ct * x), ct * params

    ``jp.check_layer(Scale(), x)`` then checks ``backward`` against ``jax.vjp`` of ``forward``.

    Mark an array that is not learned in ``init``: ``jp.Unlearned(matrix)``. ``forward`` and
    ``backward`` receive the array itself, and ``d_params`` has ``()`` in its place.

    ``forward`` is checked against ``init``: before it runs, the structure and shapes of its params
    are compared with those that ``init`` would make for x, and a difference raises ``ValueError``
    naming the layer, the leaf and both shapes. Shapes are static, so under ``jit`` this happens
    while tracing and costs nothing afterwards.

    Attributes:
        takes: the kind of side input, ``jp.Key`` or ``jp.Mask``, that a step may hand to the layer.
            ``forward`` and ``backward`` find it in place of the layer's params ``()``, or where
            ``with_side_input`` puts it.
        mixes_positions: whether a position of y depends on other positions of x, in a layer that
            takes no mask. A net with such a layer refuses a mask.
        hands_down_types: whether ``forward`` and ``backward`` receive params with types such as
            ``jp.Unlearned``, as a layer made of layers must.
        is_derivative: whether ``backward`` is the derivative of ``forward``, and not another rule
            (``jp.rules``).
        is_linear: whether ``backward`` is linear in ct; one that clips ct is not.
        by_module: whether a walk visits each module of the layer as if it were a layer. A module is
            the params that stand together in a node of their tree.
    """

    takes: ClassVar[type[SideInput] | None] = None
    mixes_positions: ClassVar[bool] = False
    hands_down_types: ClassVar[bool] = False
    is_derivative: ClassVar[bool] = True
    is_linear: ClassVar[bool] = True
    by_module: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        contract = {
            "init": held_to_key,
            "init_with_output": held_to_key,
            "forward": held_to_init,
            "backward": held_to_pair,
        }
        for name, held in contract.items():
            method = vars(cls).get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                setattr(cls, name, held(method))

    def init(self, key: Array, x: PyTree) -> Params:
        """Return params for inputs like x.

        Args:
            key: a key from ``jax.random.key``.
            x: an input, or its ``jax.ShapeDtypeStruct``.

        Returns:
            A pytree of arrays; ``()`` if there are none.
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

        ``d_params`` has the structure of params, with a form or an array for each learned array
        and ``()`` for anything else. d_x has the shape and dtype of x; it is None for integers.
        """

    def __call__(
        self, params: Params, x: PyTree, *, key: Array | None = None, mask: Array | None = None
    ) -> PyTree:
        """Return y alone: a prediction, for ``jp.inference_mode(net)``.

        Args:
            params: the layer's params.
            x: its input.
            key: a side input, as ``bind`` takes it.
            mask: a side input, as ``bind`` takes it.
        """
        return self.forward(self.bind(params, key=key, mask=mask), x)[0]

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        """Run ``backward`` and return ``(visit(step), d_x)``: the visit's result replaces d_params.

        A layer made of layers hands ``visit`` down. It then runs at each layer as soon as the
        layer's cotangents exist, and only its results are kept.

        Args:
            place: the params, or what a ``Placed`` visit keeps in their place.
            residuals: what ``forward`` saved.
            ct: the cotangent of y.
            visit: a function of a ``Step``.
        """
        params = params_of(place, visit)
        d_params, d_x = self.backward(params, residuals, ct)

        def visited(params: Params, d_params: Cotangent, place: PyTree) -> Visited:
            return visit(Step.of(self, params, residuals, ct, d_params, d_x, place))

        if self.by_module:
            return map_modules(visited, params, d_params, place), d_x
        return visited(params, d_params, place), d_x

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

        An example then has no gradient of its own, and per-example quantities raise. A layer that
        couples examples declares it (``batch_coupled = True``, or a property); by default a layer
        couples them if a layer inside it does. Where it matters, a layer that does not declare it
        is tried on two examples, which may detect it.
        """
        return any(child.layer.batch_coupled for child in self.children())

    def bind(
        self, params: Params, *, key: Array | None = None, mask: Array | None = None
    ) -> Params:
        """Return params with a step's side inputs, each in the place of the layers that take it.

        ``Dropout`` finds a key there and ``Attention`` a mask, instead of params ``()``. Every
        layer gets its own key, also inside ``repeat``. Gradients have the structure of the params
        without side inputs.

        Args:
            params: the net's params.
            key: a key from ``jax.random.key``, a new one for each step.
            mask: bool (N, T), True where a position is real. If only ``Attention`` layers take a
                mask, also (N, T, S) or (N, heads, T, S), True where a query sees a key.

        Raises:
            TypeError: for another kind of key, or a mask that is not an array of bools.
            ValueError: for a mask of another rank, a mask that no layer takes, or a mask for a net
                with a layer that mixes positions without one; and for a layer that takes a side
                input inside a layer that does not say where its params stand.
        """
        check_side_inputs(self, key, mask)
        return bound(self, params, key, None if mask is None else Mask(mask))

    def with_side_input(self, params: Params, given: SideInput) -> Params:
        """Return params with a side input that this layer takes.

        By default the side input replaces params ``()``. A layer that also has params keeps a place
        for it among them, which is ``()`` without a side input, and puts it there.

        Args:
            params: the layer's own params.
            given: a ``jp.Key`` or a ``jp.Mask``, as ``takes`` says.
        """
        del params
        return given

    def rounded(self, params: Params, dtype: Any) -> Params:
        """Return params as ``jp.cast`` computes with them: floating ones in dtype."""
        return rounded(params, dtype)

    def check_params(self, params: Params, x: PyTree) -> None:
        """Raise ``ValueError`` unless params have the structure and shapes that ``init`` makes."""
        check_params(self, params, x)

    def check_places(self, params: Params) -> None:
        """Do nothing: only a ``Combinator`` has children whose places are checked."""


def layers_in_fields(layer: Layer) -> Iterator[Layer]:
    """Yield the layers in a layer's fields, including those in tuples."""

    def within(value: object) -> Iterator[Layer]:
        if isinstance(value, Layer):
            yield value
        elif isinstance(value, type) and issubclass(value, Layer):
            require(value, Layer, f"{type(layer).__name__}: {field.name}")
        elif isinstance(value, tuple):
            for each in value:
                yield from within(each)

    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        yield from within(getattr(layer, field.name))
