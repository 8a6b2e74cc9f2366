"""The noise scale of the gradient, for chosen layers, over devices, and over steps."""

from __future__ import annotations

import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import known
from jaxprop.core.batch import Examples
from jaxprop.core.checks import check_flags, check_share, given as described
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.static import Static
from jaxprop.core.step import Total
from jaxprop.core.types import Params, PyTree
from jaxprop.core.where import Path, Where, at_path, check_where, is_path, of_layers
from jaxprop.quantity.base import Quantity, everything
from jaxprop.quantity.per_example import Moments, map_moments


class NoiseScale(Quantity):
    """tr(S) / |G|^2, with S the covariance of g_n and G its mean, each estimated without bias.

    With v the mean of |g_n - g|^2 and g the gradient, E v = (N - 1) / N tr S and
    E |g|^2 = |G|^2 + tr S / N give tr S = v N / (N - 1) and |G|^2 = |g|^2 - tr S / N. This is the
    simple noise scale of McCandlish et al. 2018 (https://arxiv.org/abs/1812.06162, appendix A),
    from one batch. If example n has weight w_n,
    E |g|^2 = |G|^2 + tr S sum_n w_n^2 / (sum_n w_n)^2, so that (sum_n w_n)^2 / sum_n w_n^2 replaces
    N. Small deviations are computed safely, as in ``Variance``.

    The noise scale of a transformer's normalization layers alone follows that of all params (Gray
    et al. 2024, https://arxiv.org/abs/2411.00999), and costs next to nothing compared with the
    gradient. Ask for it by ``where=(jp.LayerNorm, jp.RMSNorm)``, or by ``where="LayerNorm"`` in a
    function whose params have such names.

    Attributes:
        per_param: False for the ratio over all params; True for a tree like params with a
            ``NoiseParts`` for each param, and inside ``repeat`` for each layer. Their sums are the
            parts over all params. Params that ``where`` leaves out are ``()``.
        parts: whether to return a ``NoiseParts`` instead of the ratio. Both parts are unbiased, but
            their ratio is not: average each over steps (``NoiseAverage``), and then divide.
        where: which params to include: a class of layers or several, a predicate of a layer, the
            path of a layer's params in the net's, as in ``jp.rules``, or a regular expression to
            search for in a param's path, such as "params/LayerNorm_0/scale"; None for all.
        axis_name: the ``jax.shard_map`` axis, or tuple of axes, that splits the batch. The devices'
            means are then combined into the result for the whole batch. Without it each device
            has the result for its own examples.
    """

    layerwise: ClassVar[bool] = True
    per_param: bool = False
    parts: bool = False
    where: Where | str | None = None
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_flags(self, "per_param", "parts")
        if isinstance(self.where, str):
            try:
                re.compile(self.where)
            except re.error as error:
                raise ValueError(
                    f"NoiseScale: where={self.where!r} is no regular expression: {error}"
                ) from None
        elif self.where is not None:
            check_where(self.where)
        axes = (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name or ()
        if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
            raise TypeError(f"NoiseScale: axis_name is a name, or several, not {self.axis_name!r}")

    def chosen(self, layer: Layer, tree: PyTree) -> PyTree:
        if self.where is None or isinstance(self.where, str) or is_path(self.where):
            return tree
        return of_layers(self.where, layer, tree)

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        if self.axis_name is not None:
            given = examples.given
            if given is not None or examples.weights is not None:
                given = jax.lax.pmean(examples.divisor, self.axis_name)
            examples = examples._replace(given=given, whole=False)
        return jax.tree.map(
            lambda _, form: Moments.of(form.compact(), examples, False), params, forms
        )

    def gather(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        del params, examples
        if self._path is not None:
            taken = at_path(self._path, taken, is_leaf=lambda node: isinstance(node, Moments))
        if self.where is not None and not jax.tree.leaves(taken):
            raise ValueError(
                f"NoiseScale: where={self.where!r} matches no layer of the net with params "
                'that are learned; in a jp.function select params by path, such as "LayerNorm"'
            )
        return taken

    def settle(self, taken: PyTree) -> PyTree:
        if self.axis_name is not None:
            taken = jax.lax.pmean(taken, self.axis_name)
        each = map_moments(Moments.spread, taken)
        return each if self.per_param or self._path is not None else Total(_sum_of(each))

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        n = self._number(examples)
        if self.per_param:
            return jax.tree.map(lambda spread: _parts_of(spread, n), settled)
        noise = _parts_of(everything(_sum_of(settled)), n)
        return noise if self.parts else noise.trace / noise.square

    @property
    def _path(self) -> Path | str | None:
        """``where`` if it is a path or an expression, to look up once all layers are known."""
        where: Any = self.where
        return where if isinstance(where, str) or (where is not None and is_path(where)) else None

    def _number(self, examples: Examples) -> Any:
        """Return the number of examples, or with weights the equivalent number of equal weight."""
        n, weights = examples.number, examples.weights
        if self.axis_name is not None:
            n *= jax.lax.psum(1, self.axis_name)
        if known(lambda: n < 2):
            words = "the noise scale is estimated from at least 2 examples"
            raise ValueError(f"{words}, not {n}")
        if weights is None:
            return n
        sums = jnp.stack([jnp.sum(weights), jnp.sum(weights**2)])
        if self.axis_name is not None:
            sums = jax.lax.psum(sums, self.axis_name)
        return sums[0] ** 2 / sums[1]


@serializable
class NoiseParts(NamedTuple):
    """The numerator and the denominator of a noise scale, each without bias.

    Attributes:
        trace: the trace of the covariance of the per-example gradients.
        square: |G|^2 of the true gradient; its estimate from a small batch may be negative.
    """

    trace: Float[Array, "..."]
    square: Float[Array, "..."]


def _parts_of(spread: Float[Array, "... 2"], n: Any) -> NoiseParts:
    n = jnp.asarray(n, spread.dtype)
    variance, square_of_mean = spread[..., 0], spread[..., 1]
    trace = variance * n / (n - 1)
    return NoiseParts(trace, square_of_mean - trace / n)


def _sum_of(spreads: PyTree) -> Float[Array, "2"] | tuple[()]:
    leaves: list[Array] = [leaf.reshape(-1, 2).sum(axis=0) for leaf in jax.tree.leaves(spreads)]
    return sum(leaves[1:], start=leaves[0]) if leaves else ()


@serializable
class Averaged(NamedTuple):
    """The state of a ``NoiseAverage``.

    Attributes:
        parts: the moving averages, which start at 0, in place of each ``NoiseParts``.
        weight: the total weight of the steps in them, 1 - decay^t after t steps.
    """

    parts: PyTree
    weight: Float[Array, ""]


class NoiseAverage(Static):
    """The noise scale over steps, from moving averages of its two parts, each without bias.

    A batch's estimate of |G|^2 may have either sign, which makes a mean of ratios useless. Here
    trace and square are averaged, a <- decay a + (1 - decay) part, and divided by 1 - decay^t like
    Adam's moments (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980). The ratio is taken at the
    end (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1). A step whose parts
    are not finite is left out.

    Attributes:
        decay: the share that an average keeps at each step, in [0, 1).

    Example:
        >>> import jaxprop as jp
        >>> average = jp.NoiseAverage(0.9)
        >>> state = average.init()
        >>> for trace, square in ((8.0, 3.0), (8.0, -1.0)):
        ...     state = average.update(state, jp.quantity.NoiseParts(trace, square))
        >>> round(float(average.value(state)), 3)
        8.941
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        check_share("NoiseAverage: decay", self.decay)

    def init(self, parts: PyTree = None) -> Averaged:
        """Return the state to start from.

        Args:
            parts: a ``NoiseParts``, or a tree of them as from ``per_param``, with arrays or their
                shapes; None for a ``NoiseParts`` of scalars.
        """
        if parts is None:
            parts = NoiseParts(jnp.zeros(()), jnp.zeros(()))
        return Averaged(jax.tree.map(jnp.zeros_like, parts), jnp.zeros(()))

    def update(self, state: Averaged, parts: PyTree) -> Averaged:
        """Return the state after a step with these parts."""
        if jax.tree.structure(parts) != jax.tree.structure(state.parts):
            raise TypeError(
                "NoiseAverage: parts are of NoiseScale(parts=True), or of per_param as those given "
                f"to init, like {shapes(state.parts)}, not {described(parts)}"
            )
        new = Averaged(parts, jnp.ones(()))
        finite = jnp.stack([jnp.all(jnp.isfinite(part)) for part in jax.tree.leaves(new)]).all()

        def moved(old: Array, new: Any) -> Array:
            new = jnp.asarray(new, old.dtype)
            return jnp.where(finite, self.decay * old + (1 - self.decay) * new, old)

        return jax.tree.map(moved, state, new)

    def parts(self, state: Averaged) -> PyTree:
        """Return the averages, in the structure of the parts; NaN before the first step."""
        return jax.tree.map(lambda part: part / state.weight.astype(part.dtype), state.parts)

    def value(self, state: Averaged) -> PyTree:
        """Return the noise scale, in place of each ``NoiseParts``."""
        return jax.tree.map(
            lambda parts: parts.trace / parts.square,
            self.parts(state),
            is_leaf=lambda node: isinstance(node, NoiseParts),
        )
