"""Names for the trees of arrays that pass through a network, and for the functions of a batch."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar

from jax import Array

Params: TypeAlias = Any
"""A pytree of learned arrays, and of arrays that a type marks as not learned (``core.tree``)."""

Residuals: TypeAlias = Any
"""A pytree of arrays that ``forward`` saves for ``backward``, with the example on axis 0."""

Cotangent: TypeAlias = Any
"""A pytree of cotangents, with the structure of its primal."""

PyTree: TypeAlias = Any
"""Any other pytree of arrays: an input, an output, a target, an optimizer's state."""

Visited: TypeAlias = Any
"""A pytree in the structure of params, with a visit's result in the place of a layer's params."""

T_co = TypeVar("T_co", covariant=True)


class OfBatch(Protocol[T_co]):
    """A pure function of params and a batch, such as ``jp.value_and_grad(net, loss)`` returns.

    Args:
        params: the net's params, as ``net.init`` makes them.
        x: the inputs, with the example on axis 0 of every leaf.
        target: the targets, also with the example on axis 0; left out for a loss that takes none.
        key: a key from ``jax.random.key``, a new one for each step, for random layers such as
            ``Dropout`` and for anything else that is random, such as noise.
        mask: bool (N, T), True where a position is real, for the layers that take a mask; if these
            are all ``Attention``, also (N, T, S) or (N, heads, T, S), True where a query sees
            a key.
        weights: (N,), the weight of each example in every mean, at least 0; bools for a mask of
            examples. An example of weight 0 is padding: whatever x and the target hold there, it
            has no part in a mean, and any result for it alone is 0. By default each counts 1.
        divisor: the number that sums over examples are divided by for a mean; by default the sum of
            the weights.

    In a traced program, such as an update, a negative weight or a divisor that is not positive
    makes the results NaN; where the values are known, these are refused.
    """

    def __call__(
        self,
        params: Params,
        x: PyTree,
        target: PyTree = None,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> T_co: ...
