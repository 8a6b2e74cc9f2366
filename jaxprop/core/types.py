"""Names for the trees of arrays that pass through a network, and for the functions of a batch."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar

from jax import Array

Params: TypeAlias = Any
"""A pytree of learned arrays, and of arrays with a type that says otherwise (``core.tree``)."""

Residuals: TypeAlias = Any
"""A pytree of arrays that ``forward`` saves for ``backward``, with the example on axis 0."""

Cotangent: TypeAlias = Any
"""A pytree of cotangents, like the pytree that they are the cotangents of."""

PyTree: TypeAlias = Any
"""Any other pytree of arrays: an input, an output, a target, an optimizer's state."""

Visited: TypeAlias = Any
"""A pytree in the structure of params, with what a visit returned where a layer's params stand."""

T_co = TypeVar("T_co", covariant=True)


class OfBatch(Protocol[T_co]):
    """A pure function of params and a batch, such as ``jp.value_and_grad(net, loss)`` returns.

    Args:
        params: the net's params, as ``net.init`` makes them.
        x: the inputs, with the example on axis 0 of every leaf.
        target: the targets, likewise; left out for a loss that takes none.
        key: a key of ``jax.random.key``, a new one each step, for layers that draw, such as
            ``Dropout``, and for whatever else is random, such as noise.
        mask: bool (N, T), True where a position is real, for the layers that take a mask; for
            ``Attention`` alone also (N, T, S), True where a query sees a key.
        weights: (N,), what each example counts in every mean, at least 0; bools for a mask of
            examples. One that counts 0 is padding: whatever x and the target hold there, it has no
            part in a mean, and what is returned of it alone is 0. By default each counts 1.
        divisor: what sums over examples are divided by for a mean; the sum of the weights by
            default.

    In a traced program, such as an update is, a negative weight, and a divisor that is not
    positive, make what is returned NaN; where they are known they are refused.
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
