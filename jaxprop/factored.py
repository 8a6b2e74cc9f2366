"""Factored cotangents: a parameter's cotangent kept as its factors until somebody asks for its sum.

The chain rule's last product for y = x w is dE/dw = sum_n x_n (outer) ct_n. Multiplied out, the
examples are gone. Kept as the pair (x, ct), it still answers for each example, for squared norms,
for curvature, at the price of what is asked and no more. Each form says how its parameter's share
of one example, g_n, is made of factors; every other question has an answer through ``per_example``,
and a faster one where the factors allow it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float


class Kronecker(NamedTuple):
    """a (outer) b, the Kronecker product of an (I, I) and an (O, O) matrix, for a param (I, O)."""

    a: Float[Array, "i i"]
    b: Float[Array, "o o"]


@dataclass_transform(frozen_default=True)
class Factored(abc.ABC):
    """The cotangent of one parameter, sum_n g_n, not yet summed over the examples n.

    Axis 0 of every factor is the example. A parameter may have several cotangents, one for each
    column of a Hessian root: ``squares`` is what can be added up over them, and ``kronecker`` takes
    the name of the ``jax.vmap`` axis that they lie on.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    @abc.abstractmethod
    def per_example(self) -> Float[Array, "n ..."]:
        """g_n for each example: the parameter's shape behind an example axis."""

    def sum(self) -> Array:
        """sum_n g_n: what autodiff returns."""
        return self.per_example().sum(axis=0)

    def weighted_sum(self, weights: Float[Array, " n"]) -> Array:
        """sum_n weights_n g_n."""
        g = _wide(self.per_example())
        return jnp.tensordot(weights.astype(g.dtype), g, axes=1)

    def sq_norms(self) -> Float[Array, " n"]:
        """|g_n|^2 for each example."""
        return _sq_norms(self.per_example())

    def bounding_sq_norms(self) -> Float[Array, " n"]:
        """|g_n|^2 in a way that cannot cancel, for whoever relies on it as a bound."""
        return self.sq_norms()

    def inner_products(self) -> Float[Array, "n n"]:
        """<g_n, g_m> for each pair of examples."""
        g = _wide(self.per_example())
        g = g.reshape(len(g), -1)
        return g @ g.T

    def second_moment(self) -> Array:
        """sum_n g_n^2, elementwise."""
        return self.of_squares(self.squares())

    def squares(self) -> Array:
        """What ``of_squares`` makes the second moment of; that of several cotangents adds up."""
        return jnp.sum(_wide(self.per_example()) ** 2, axis=0)

    def of_squares(self, squares: Array) -> Array:
        """The second moment, summed like squares. It does not look at the form's own cotangent."""
        return squares

    def kronecker(self, over: str | None = None) -> Kronecker:
        """The two Gram matrices, sums over examples and positions: of the input and of ct."""
        raise TypeError(f"{type(self).__name__} has no Kronecker factors")


class Stacked(Factored):
    """g_n itself, of shape (N, ...): what any layer's backward gives, one example at a time."""

    g: Float[Array, "n ..."]

    def per_example(self) -> Float[Array, "n ..."]:
        return self.g


class Sum(Factored):
    """g_n = sum over positions t of ct[n, t], of shape (O,)."""

    ct: Float[Array, "n ... o"]

    def per_example(self) -> Float[Array, "n o"]:
        return self.ct.sum(axis=tuple(range(1, self.ct.ndim - 1)))

    def sum(self) -> Float[Array, " o"]:
        return self.ct.sum(axis=tuple(range(self.ct.ndim - 1)))

    def weighted_sum(self, weights: Float[Array, " n"]) -> Float[Array, " o"]:
        return Sum(_weighted(_wide(self.ct), weights)).sum()

    def squares(self) -> Float[Array, "n o"]:
        return _wide(self.per_example()) ** 2

    def of_squares(self, squares: Float[Array, "n o"]) -> Float[Array, " o"]:
        return squares.sum(axis=0)

    def kronecker(self, over: str | None = None) -> Kronecker:
        examples = jnp.full((1, 1), len(self.ct), _wide(self.ct).dtype)
        return Kronecker(examples, _gram(_rows(self.ct, over)))


class Outer(Factored):
    """g_n = sum over positions t of x[n, t] (outer) ct[n, t], of shape (I, O).

    ct is linear in the cotangent of the layer's output, and x does not depend on it.
    """

    x: Float[Array, "n ... i"]
    ct: Float[Array, "n ... o"]

    def per_example(self) -> Float[Array, "n i o"]:
        return jnp.einsum("nti,nto->nio", *self._sequences())

    def sum(self) -> Float[Array, "i o"]:
        axes = tuple(range(self.x.ndim - 1))
        return jnp.tensordot(self.x, self.ct, (axes, axes), out_sharding=_product_sharding(self))

    def weighted_sum(self, weights: Float[Array, " n"]) -> Float[Array, "i o"]:
        return Outer(_wide(self.x), _weighted(_wide(self.ct), weights)).sum()

    def sq_norms(self) -> Float[Array, " n"]:
        """|x|^2 |ct|^2; along T positions <X X^T, C C^T>, or |X^T C|^2 where that is cheaper."""
        x, ct = map(_wide, self._sequences())
        (_, t, i), o = x.shape, ct.shape[-1]
        if t == 1:
            return _sq_norms(x) * _sq_norms(ct)
        if t * (i + o) > i * o:
            return super().sq_norms()
        products = jnp.einsum("nti,nsi->nts", x, x) * jnp.einsum("nto,nso->nts", ct, ct)
        return jnp.maximum(products.sum(axis=(1, 2)), 0)

    def bounding_sq_norms(self) -> Float[Array, " n"]:
        """Along positions |X^T C|^2, one example after the other: a sum of squares."""
        x, ct = map(_wide, self._sequences())
        if x.shape[1] == 1:
            return self.sq_norms()
        return jax.lax.map(lambda example: jnp.sum((example[0].T @ example[1]) ** 2), (x, ct))

    def inner_products(self) -> Float[Array, "n n"]:
        """(x_n . x_m)(ct_n . ct_m), summed over pairs of positions, or through g where cheaper."""
        x, ct = map(_wide, self._sequences())
        (n, t, i), o = x.shape, ct.shape[-1]
        if n * t * t * (i + o) > (t + n) * i * o:
            return super().inner_products()
        products = jnp.einsum("nti,msi->ntms", x, x) * jnp.einsum("nto,mso->ntms", ct, ct)
        return products.sum(axis=(1, 3))

    def squares(self) -> Array:
        """ct^2, for (x^2)^T (ct^2). Along T > 1 positions their sum comes before the square."""
        x, ct = map(_wide, self._sequences())
        if x.shape[1] == 1:
            return ct[:, 0] ** 2

        def add(total: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
            x, ct = example
            return total + (x.T @ ct) ** 2, None

        zero = jnp.zeros((x.shape[-1], ct.shape[-1]), jnp.result_type(x, ct))
        return jax.lax.scan(add, zero, (x, ct))[0]

    def of_squares(self, squares: Array) -> Float[Array, "i o"]:
        x, _ = self._sequences()
        if x.shape[1] > 1:
            return squares
        return Outer(_wide(x[:, 0]) ** 2, squares).sum()

    def kronecker(self, over: str | None = None) -> Kronecker:
        return Kronecker(_gram(_rows(self.x)), _gram(_rows(self.ct, over)))

    def _sequences(self) -> tuple[Float[Array, "n t i"], Float[Array, "n t o"]]:
        """The factors with their positions on one axis, of length 1 where there are none."""
        length = math.prod(self.x.shape[1:-1])
        return (
            self.x.reshape(self.x.shape[0], length, self.x.shape[-1]),
            self.ct.reshape(self.ct.shape[0], length, self.ct.shape[-1]),
        )


def summed(d_params: Any) -> Any:
    """d_params with every factored leaf multiplied out and summed."""
    return jax.tree.map(
        lambda leaf: leaf.sum() if isinstance(leaf, Factored) else leaf,
        d_params,
        is_leaf=is_factored,
    )


def gradient(params: Any, d_params: Any) -> Any:
    """The summed d_params, held to the form of params: what autodiff would return.

    Raises ``TypeError`` for a param that is not floating and ``ValueError`` for a cotangent whose
    structure or shape is not its param's.
    """

    def fit(path: Any, param: Array, d_param: Any) -> Array:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(param), jnp.floating):
            raise TypeError(f"params{name} is {jnp.result_type(param)}: no gradient by it exists")
        shape = getattr(d_param, "shape", type(d_param).__name__)
        if shape != jnp.shape(param):
            raise ValueError(
                f"d_params{name} has shape {shape}, but params{name} has {jnp.shape(param)}"
            )
        return like(param, d_param)

    totals = summed(d_params)
    try:
        jax.tree.map(lambda param, d_param: None, params, totals)
    except ValueError as error:
        raise ValueError(f"d_params has another structure than params: {error}") from None
    return jax.tree.map_with_path(fit, params, totals)


def like(primal: Any, cotangent: Array) -> Array:
    """The cotangent in its primal's dtype and, under ``jax.shard_map``, where its primal is.

    There a param that is the same on all devices meets another share of the batch on each. Its
    cotangent is the sum over them, which is JAX's own rule for using the one beside the other.
    """
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        beside = jnp.zeros_like(cotangent)
        _, pull = jax.vjp(lambda primal: primal.astype(cotangent.dtype) + beside, primal)
        return pull(cotangent)[0]
    return cotangent.astype(jnp.result_type(primal))


def is_factored(leaf: object) -> bool:
    return isinstance(leaf, Factored)


def _product_sharding(form: Outer) -> NamedSharding | None:
    """Where a mesh has explicit axes: each axis of the product as it lies in its factor."""
    x, ct = jax.typeof(form.x).sharding, jax.typeof(form.ct).sharding
    if AxisType.Explicit not in ct.mesh.axis_types:
        return None
    return NamedSharding(ct.mesh, PartitionSpec(x.spec[-1], ct.spec[-1]))


def _weighted(ct: Float[Array, "n ..."], weights: Float[Array, " n"]) -> Float[Array, "n ..."]:
    return ct * jnp.expand_dims(weights.astype(ct.dtype), range(1, ct.ndim))


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _rows(x: Float[Array, "n ... d"], over: str | None = None) -> Float[Array, "m d"]:
    """x as a matrix of all its rows, those along the vmap axis ``over`` included."""
    x = _wide(x)
    if over is not None:
        x = jax.lax.all_gather(x, over)
    return x.reshape(-1, x.shape[-1])


def _gram(x: Float[Array, "m d"]) -> Float[Array, "d d"]:
    return x.T @ x


def _sq_norms(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    return jnp.sum(_wide(x) ** 2, axis=tuple(range(1, x.ndim)))
