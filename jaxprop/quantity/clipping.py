"""Clipping: each example's own gradient is bounded before the mean is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import weighted
from jaxprop.core.batch import Examples
from jaxprop.core.checks import check_flags, check_number, given, is_known
from jaxprop.core.describe import shapes
from jaxprop.core.forms import is_factored, norms_of_all
from jaxprop.core.mesh import like
from jaxprop.core.serialization import serializable
from jaxprop.core.tree import like_params, without_unmarked
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.base import PerExample, Quantity, Whole, everything, map_forms, unmarked

Weight: TypeAlias = Callable[[Array, Any], Array]
NOISE = 0x6E6F6973  # folded into the key, so that noise does not depend on what the layers draw


@serializable
class ClippedMean(NamedTuple):
    """The mean of clipped gradients, the norms before clipping, and the share that was clipped.

    Attributes:
        grads: the mean; like params.
        norms: (N,), the norm of each example's gradient before it was clipped; with ``per_layer``
            like params, with (N,) in place of each layer's params, (L, N) inside ``repeat``.
        clipped: the share of examples whose gradient was clipped; with ``per_layer`` one for each
            layer, in the same structure.
    """

    grads: Params
    norms: PyTree
    clipped: PyTree


class Bounded(NamedTuple):
    """The mean of some params' clipped gradients, and the norms, as taken by ``Clipped``."""

    mean: PyTree
    norms: PerExample


class Measured(NamedTuple):
    """The part that ``Clipped`` takes before all norms are known: forms, and their norms.

    Attributes:
        forms: like a layer's params.
        norms: (N,), |g_n| of each param, or over all of them where the layer has its own bound.
    """

    forms: PyTree
    norms: PyTree


class Clipped(Quantity):
    """The mean of clipped gradients, 1/N sum_n g_n min(1, max_norm / |g_n|); like params.

    Another ``weight`` may replace the minimum, such as that of ``automatic`` clipping (Bu et al.
    2022, https://arxiv.org/abs/2206.07136); the clipped norms still do not exceed max_norm.

    The g_n are not stored: one walk back leaves their factors, from which the norms and the
    weighted sum are computed. An example whose gradient is not finite makes the mean not finite,
    unless it is dropped.

    With a noise_multiplier it is DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133):
    normal noise of standard deviation noise_multiplier * max_norm is added to each entry of the
    *sum* of clipped gradients before the division by N. This is the definition of
    ``optax.contrib.differentially_private_aggregate``, and of the accountants that take a noise
    multiplier. A Poisson sample has another size each step: pad it with examples of weight 0, and
    give its expected size as the ``divisor``. An empty sample then returns the noise alone.

    Attributes:
        max_norm: the bound on |g_n|, positive and finite: a number, or a scalar array (which
            ``jax.jit`` may trace). With per_layer also a tree with a bound in place of each layer's
            params, and ``()`` for a layer without params; inside ``repeat`` a bound may be an array
            (L,), one for each layer.
        noise_multiplier: the standard deviation of the noise in units of the bound, a finite number
            or a scalar array. If it is above 0 or an array, the function takes a key, a new one
            each step, and raises ``TypeError`` for params narrower than float32, which would round
            the noise away.
        per_layer: whether to bound each layer's part of g_n by max_norm separately. With L layers
            that have params, the norm over all layers is then at most sqrt(L) max_norm, or the root
            of the sum of their squared bounds, and the noise is that much larger.
        two_pass: whether to walk back twice, for the norms and then for the sum, so that no layer's
            cotangents are needed after that layer. In ``repeat`` this saves their memory. For
            unrolled layers it depends on XLA's schedule, which on a CPU goes back through the whole
            chain first, and saves nothing.
        drop_nonfinite: whether to count a gradient that is not finite as 0; with per_layer, only
            the layer's part that is not finite.
        norms: whether to return a ``ClippedMean``, which adds the norms to the mean.
        weight: a function ``weight(norms, max_norm)`` that returns the factor on each g_n, for
            norms (N,). The factor's absolute value is limited to max_norm / |g_n|.
    """

    max_norm: float | Array | PyTree
    noise_multiplier: float | Array = 0.0
    per_layer: bool = False
    two_pass: bool = False
    drop_nonfinite: bool = False
    norms: bool = False
    weight: Weight | None = None

    def __post_init__(self) -> None:
        check_flags(self, "per_layer", "two_pass", "drop_nonfinite", "norms")
        leaves: list[Any] = jax.tree.leaves(self.max_norm) if self._by_tree else [self.max_norm]
        for leaf in leaves:
            of_layers = self._by_tree and getattr(leaf, "ndim", 0) == 1
            leaf = np.asarray(leaf) if of_layers and is_known(leaf) else leaf
            for bound in leaf if of_layers else [leaf]:
                check_number("max_norm", bound, positive=True, finite=True)
        if self.weight is not None and not callable(self.weight):
            raise TypeError(f"weight is a function of norms and max_norm, not {given(self.weight)}")
        check_number("noise_multiplier", self.noise_multiplier, finite=True)
        if self.per_layer and self.two_pass:
            raise ValueError("per_layer needs one pass: a layer's norms are known at that layer")

    @property
    def _by_tree(self) -> bool:
        """Whether each layer has its own bound, to look up once all layers are known."""
        return self.per_layer and not jax.tree_util.all_leaves([self.max_norm])

    @property
    def layerwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.per_layer

    @property
    def before(self) -> Quantity | None:
        return Norms() if self.two_pass else None

    def take(
        self, params: Params, forms: PyTree, examples: Examples, before: PyTree = None
    ) -> PyTree:
        if self.two_pass:
            return self._bounded(params, forms, before, examples)
        if not jax.tree.leaves(params):
            return forms
        forms = map_forms(lambda form: form.compact(), forms)
        if self.per_layer and not self._by_tree:
            return self._bounded(params, forms, _norms(forms), examples)
        norms = map_forms(lambda form: form.norms(), forms)
        return Measured(forms, norms_of_all(norms) if self._by_tree else norms)

    def gather(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        if self._by_tree:
            return self._by_layer(params, taken, examples)
        if not self.two_pass and not self.per_layer:
            norms, forms = _each(taken, "norms"), _each(taken, "forms")
            if jax.tree.leaves(norms):
                params, norms = without_unmarked(params, forms), norms_of_all(norms)
                taken = self._bounded(params, forms, norms, examples)
        elif self.two_pass:  # each layer received the norms over all params
            told = jax.tree.leaves(_each(taken, "norms"))[:1]
            norms = [PerExample(each[(0,) * (each.ndim - 1)], axis=-1) for each in told]
            taken = Bounded(_each(taken, "mean"), *norms) if norms else ()
        if not jax.tree.leaves(taken):
            everything(taken)
        return taken

    def end(self, settled: PyTree, batch: Whole) -> PyTree:
        mean, norms = (_each(settled, field) for field in Bounded._fields)
        if not (isinstance(self.noise_multiplier, int | float) and self.noise_multiplier == 0):
            mean = self._noisy(mean, norms, batch)
        grads = like_params(batch.params, mean)
        if not self.norms:
            return grads
        norms = unmarked(norms)

        def share(norms: Array, bound: Any) -> Array:
            bound = jnp.broadcast_to(bound, norms.shape[:-1])[..., None]
            return batch.examples.share(norms > bound)

        return ClippedMean(grads, norms, self._with_bounds(share, norms))

    def _by_layer(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        """Return each layer's mean, clipped by the layer's own bound."""

        def of_layer(measured: Measured, bound: Any, params: Params) -> Bounded:
            if measured.norms.ndim == 1:
                return self._bounded(params, *measured, examples, bound)
            inner = map_forms(lambda form: getattr(form, "form", form), measured.forms)
            bound = jnp.broadcast_to(bound, measured.norms.shape[:1])
            return jax.vmap(of_layer)(Measured(inner, measured.norms), bound, params)

        params = without_unmarked(params, _each(taken, "forms"))
        return self._with_bounds(of_layer, taken, params)

    def _with_bounds(self, f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        """Return the tree with ``f(node, bound, ...)`` for the node of each layer with params.

        Args:
            f: a function of the node, the layer's bound, and the nodes in the same place of rest.
            tree: the parts that were taken, or the norms.
            rest: trees of the same structure, or deeper.
        """
        if not self._by_tree:
            return jax.tree.map(lambda node: f(node, self.max_norm), tree)
        nodes, structure = jax.tree.flatten(tree, is_leaf=_is_of_layer)
        try:
            bounds = structure.flatten_up_to(self.max_norm)
        except ValueError:
            like = structure.unflatten(1.0 if jax.tree.leaves(node) else () for node in nodes)
            raise ValueError(
                f"max_norm is {shapes(self.max_norm)}: give a bound where each layer's params "
                f"stand, and () for a layer without, as in {like}"
            ) from None
        for node, bound in zip(nodes, bounds, strict=True):
            layers = np.shape(getattr(node, "norms", node))[:-1]
            if jax.tree.leaves(node) and np.shape(bound) not in ((), layers):
                kind = f"a number, or one for each of {layers[0]} layers" if layers else "a number"
                raise ValueError(f"max_norm: a layer's bound is {kind}, not {shapes(bound)}")
        each = zip(nodes, bounds, *map(structure.flatten_up_to, rest), strict=True)
        return structure.unflatten(f(*one) if jax.tree.leaves(one[0]) else one[0] for one in each)

    def _bounded(
        self,
        params: Params,
        forms: PyTree,
        norms: Float[Array, " n"],
        examples: Examples,
        bound: Any = None,
    ) -> Bounded:
        """Return the mean of the gradients times their weights, and the norms |g_n|.

        The bound is max_norm if it is not given.
        """
        bound = self.max_norm if bound is None else bound
        weights = bound / jnp.maximum(norms, bound)
        if self.weight is not None:
            largest = bound / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)
            weights = jnp.clip(self.weight(norms, bound), -largest, largest)
        if examples.weights is None:
            weights = examples.over(weights)
        else:
            weights = weighted(weights, examples.shares())
        if self.drop_nonfinite:
            finite = jnp.isfinite(norms)
            forms = map_forms(lambda form: form.only(finite), forms)
            weights = jnp.where(finite, weights, 0)
        mean = jax.tree.map(lambda p, form: like(p, form.weighted_sum(weights)), params, forms)
        return Bounded(mean, PerExample(norms, axis=-1))

    def _noisy(self, grads: PyTree, norms: PyTree, batch: Whole) -> PyTree:
        leaves, structure = jax.tree.flatten(grads)
        if batch.key is None:
            raise ValueError("a noise_multiplier needs a key, a new one each step")
        if any(leaf.dtype.itemsize < 4 for leaf in leaves):
            raise TypeError("noise is for params of float32 or float64: narrower ones round it")
        bound = self._bound_of_all(norms)
        deviation = self.noise_multiplier * bound / batch.examples.divisor
        keys = jax.random.split(jax.random.fold_in(batch.key, NOISE), len(leaves))
        noisy = [
            leaf + (deviation * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, noisy)

    def _bound_of_all(self, norms: PyTree) -> Array:
        """Return the bound on the norm, over all params, of what one example adds to the sum."""

        def squares(norms: Array, bound: Any) -> Array:
            return jnp.sum(jnp.broadcast_to(bound, norms.shape[:-1]) ** 2)

        each = self._with_bounds(squares, unmarked(norms))
        return jnp.sqrt(sum(jax.tree.leaves(each)))


class Norms(Quantity):
    """|g_n| over all params, computed so that it neither cancels nor overflows; (N,)."""

    layerwise: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return PerExample(_norms(forms), axis=-1) if jax.tree.leaves(forms) else ()

    def finish(self, settled: PyTree, examples: Examples) -> Float[Array, " n"]:
        norms = unmarked(settled)
        return norms_of_all(norms) if jax.tree.leaves(norms) else everything(norms)


def _norms(forms: PyTree) -> Float[Array, " n"]:
    """Return |g_n| over all forms of a tree, which has at least one."""
    leaves = jax.tree.leaves(forms, is_leaf=is_factored)
    return norms_of_all([form.norms() for form in leaves]) if leaves else everything(())


def automatic(norms: Array, max_norm: float | Array) -> Array:
    """Return max_norm / (|g_n| + 0.01), the weight of automatic clipping (Bu et al. 2022).

    It rescales every gradient, so that only the product of max_norm and the learning rate matters.

    Args:
        norms: (N,), the |g_n|.
        max_norm: the bound.
    """
    return max_norm / (norms + 0.01)


def normalized(norms: Array, max_norm: float | Array) -> Array:
    """Return max_norm / |g_n|, which gives each gradient the norm max_norm, except one that is 0.

    Args:
        norms: (N,), the |g_n|.
        max_norm: the bound.
    """
    return jnp.where(norms > 0, max_norm / jnp.where(norms > 0, norms, 1), 0)


def next_max_norm(
    max_norm: float | Array,
    clipped: float | Array,
    *,
    quantile: float = 0.5,
    rate: float = 0.2,
) -> Array:
    """Return the bound for the next step, moved towards a quantile of the norms.

    The new bound is max_norm exp(-rate (share unclipped - quantile)) (Andrew et al. 2021,
    https://arxiv.org/abs/1905.03871). For differential privacy, first add noise to ``clipped``, and
    account for it.

    Args:
        max_norm: the bound of this step.
        clipped: the share of examples that it clipped, from a ``ClippedMean`` or an ``Aux``.
        quantile: the quantile to move towards, between 0 and 1.
        rate: how far a step goes.

    Example:
        >>> import jaxprop as jp
        >>> bound = 1.0
        >>> for _ in range(2):
        ...     bound = jp.quantity.next_max_norm(bound, 1.0)  # all were clipped
        >>> print(f"{bound:.3f}")
        1.221
    """
    for name, number in (("quantile", quantile), ("rate", rate)):
        check_number(f"next_max_norm: {name}", number, finite=True)
    if is_known(quantile) and np.asarray(quantile) > 1:
        raise ValueError(f"next_max_norm: quantile is from 0 to 1, not {quantile}")
    unclipped = 1 - jnp.asarray(clipped, float)
    return jnp.asarray(max_norm, float) * jnp.exp(-rate * (unclipped - quantile))


def _is_of_layer(node: object) -> bool:
    """Return whether a node holds one layer's result, or nothing, for a layer without params."""
    return isinstance(node, Measured) or not jax.tree.leaves(node)


def _each(settled: PyTree, field: str) -> PyTree:
    return jax.tree.map(
        lambda node: getattr(node, field),
        settled,
        is_leaf=lambda node: isinstance(node, Bounded | Measured),
    )
