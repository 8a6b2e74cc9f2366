"""Rules that change the cotangent that a layer hands back."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.combinators.chain import chain
from jaxprop.core.checks import check_number, given
from jaxprop.core.combinator import Combinator, Wrapper
from jaxprop.core.forms import norms_of_all
from jaxprop.core.forms.form import norms
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.tree import Key
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited
from jaxprop.rules.select import Where, with_rule


class Changed(Wrapper, Combinator):
    """A layer y = f(x) that changes the cotangent of x before it hands it back.

    The gradient of f's own params stays the same; that of everything before f changes.

    Attributes:
        layer: f.
    """

    is_derivative: ClassVar[bool] = False

    @abc.abstractmethod
    def changed(self, d_x: Cotangent) -> Cotangent:
        """Return the cotangent to hand back in place of d_x, whose leaves are None for integers."""

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        return self.layer.init_with_output(key, x)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        return self.layer.forward(params, x)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        visited, d_x = self.layer.walk(place, residuals, ct, visit)
        return visited, self.changed(d_x)


class ScaleGradient(Changed):
    """The rule scale * d_x; -1 reverses it (Ganin and Lempitsky 2015, arxiv.org/abs/1409.7495).

    Attributes:
        scale: the number.
    """

    scale: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale, finite=True, signed=True)

    def changed(self, d_x: Cotangent) -> Cotangent:
        return jax.tree.map(lambda d: d * jnp.asarray(self.scale, d.dtype), d_x)


class StopGradient(Changed):
    """The rule d_x = 0: nothing before f sees the error, as with ``jax.lax.stop_gradient(x)``."""

    def changed(self, d_x: Cotangent) -> Cotangent:
        return jax.tree.map(jnp.zeros_like, d_x)


class ClipCotangent(Changed):
    """The rule that bounds d_x: each entry by max_value, or each example's norm by max_norm.

    The scale of d_x depends on what is computed. Per-example quantities and clipping use the
    cotangent of an example's own loss. For the gradient of the mean over N examples d_x is 1/N of
    that, so that the same bound is N times as loose; with ``micro_batches``, N is that of a part.

    Attributes:
        max_value: the largest |entry|, or None.
        max_norm: the largest |d_x_n|, over all leaves of x, or None.
    """

    max_value: float | None = None
    max_norm: float | None = None

    is_linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.max_value is None) == (self.max_norm is None):
            raise ValueError("clip_cotangent takes one of max_value and max_norm")
        for name in ("max_value", "max_norm"):
            bound = getattr(self, name)
            if bound is not None:
                check_number(name, bound, positive=True)

    def changed(self, d_x: Cotangent) -> Cotangent:
        leaves, bound = jax.tree.leaves(d_x), self.max_value or self.max_norm
        assert bound is not None
        if self.max_value is not None:
            return jax.tree.map(lambda d: jnp.clip(d, -bound, bound), d_x)
        if not leaves:
            return d_x
        size = norms_of_all([norms(d) for d in leaves])
        scale = bound / jnp.maximum(size, bound)
        return jax.tree.map(
            lambda d: (d * jnp.expand_dims(scale, range(1, d.ndim))).astype(d.dtype), d_x
        )


class QuantizeCotangent(Changed):
    """The rule that rounds d_x to a narrower dtype and back; its largest number bounds d_x.

    As in ``ClipCotangent``, d_x is 1/N of an example's own for the mean over N examples.

    Attributes:
        dtype: the name of a floating dtype.
    """

    dtype: str = "bfloat16"
    is_linear: ClassVar[bool] = False

    def changed(self, d_x: Cotangent) -> Cotangent:
        largest = float(jnp.finfo(self.dtype).max)

        def rounded(d: Array) -> Array:
            most = min(largest, float(jnp.finfo(d.dtype).max))
            narrow = jnp.clip(d, -most, most).astype(self.dtype)
            return jax.lax.optimization_barrier(narrow).astype(d.dtype)  # else XLA removes it

        return jax.tree.map(rounded, d_x)


class NoisyCotangent(Layer):
    """The identity y = x with d_x = ct + normal noise; without a key, d_x = ct.

    ``net.bind(params, key=key)`` puts a ``jp.Key`` in the place of the params ``()``.

    Attributes:
        deviation: the standard deviation of the noise on each entry.
    """

    deviation: float
    takes: ClassVar[type[Key]] = Key
    is_derivative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("noisy_cotangent: deviation", self.deviation, finite=True)

    def forward(self, params: Any, x: PyTree) -> tuple[PyTree, tuple[()]]:
        return x, ()

    def backward(self, params: Any, residuals: Any, ct: Cotangent) -> tuple[tuple[()], Cotangent]:
        if not isinstance(params, Key):
            return (), ct
        leaves, structure = jax.tree.flatten(ct)
        keys = jax.random.split(params.value, len(leaves))
        noisy = [
            d + jnp.asarray(self.deviation, d.dtype) * jax.random.normal(key, d.shape, d.dtype)
            for key, d in zip(keys, leaves, strict=True)
        ]
        return (), jax.tree.unflatten(structure, noisy)


def reverse_gradient(layer: Layer, *, scale: float = 1.0, where: Where | None = None) -> Layer:
    """Return the layer that hands back -scale d_x, to train the layers before it against the loss.

    Ganin and Lempitsky 2015, https://arxiv.org/abs/1409.7495: the layer itself learns as usual.

    Args:
        layer: the layer, or a net.
        scale: a number.
        where: which layers of the net; by default the net as a whole.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> net = jp.rules.reverse_gradient(jp.Tanh(), scale=2.0)
        >>> net.backward((), net.forward((), jnp.zeros((1, 2)))[1], jnp.ones((1, 2)))[1].tolist()
        [[-2.0, -2.0]]
    """
    check_number("reverse_gradient: scale", scale, finite=True, signed=True)
    return _around(layer, lambda layer: ScaleGradient(layer, -scale), where)


def scale_gradient(layer: Layer, *, scale: float, where: Where | None = None) -> Layer:
    """Return the layer that hands back scale d_x.

    Args:
        layer: the layer, or a net.
        scale: a number.
        where: as in ``reverse_gradient``.
    """
    return _around(layer, lambda layer: ScaleGradient(layer, scale), where)


def stop_gradient(layer: Layer, *, where: Where | None = None) -> Layer:
    """Return the layer that hands back zeros.

    Args:
        layer: the layer, or a net.
        where: as in ``reverse_gradient``.
    """
    return _around(layer, StopGradient, where)


def clip_cotangent(
    layer: Layer,
    *,
    max_value: float | None = None,
    max_norm: float | None = None,
    where: Where | None = None,
) -> Layer:
    """Return the layer that hands back d_x with each entry, or each example's norm, bounded.

    In ``jp.value_and_grad`` and updates, d_x includes the 1/N of the mean over N examples; in
    per-example quantities it does not.

    Args:
        layer: the layer, or a net.
        max_value: the bound on |entry|; give this or max_norm.
        max_norm: the bound on an example's norm.
        where: as in ``reverse_gradient``.
    """
    return _around(layer, lambda layer: ClipCotangent(layer, max_value, max_norm), where)


def quantize_cotangent(
    layer: Layer, dtype: Any = jnp.bfloat16, *, where: Where | None = None
) -> Layer:
    """Return the layer that hands back d_x rounded to a dtype, such as bfloat16 or float8_e5m2.

    Args:
        layer: the layer, or a net.
        dtype: a floating dtype; others raise ``TypeError``.
        where: as in ``reverse_gradient``.
    """
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"quantize_cotangent takes a floating dtype, not {given(dtype)}")
    name = jnp.dtype(dtype).name
    return _around(layer, lambda layer: QuantizeCotangent(layer, name), where)


def noisy_cotangent(layer: Layer, *, deviation: float, where: Where | None = None) -> Layer:
    """Return the layer with normal noise added to the d_x that it hands back.

    The result is ``chain(NoisyCotangent(deviation), layer)``, and takes a key as ``Dropout`` does.

    Args:
        layer: the layer, or a net.
        deviation: the standard deviation of the noise on each entry.
        where: as in ``reverse_gradient``.
    """
    return _around(layer, lambda layer: chain(NoisyCotangent(deviation), layer), where)


def _around(net: Layer, rule: Callable[[Layer], Layer], where: Where | None) -> Layer:
    return rule(net) if where is None else with_rule(net, rule, where)
