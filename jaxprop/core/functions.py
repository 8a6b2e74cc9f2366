"""The functions of a batch that makers such as ``jp.value_and_grad`` return."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from jax import Array

from jaxprop.core.batch import Batch, weighted_batch
from jaxprop.core.layer import Layer
from jaxprop.core.types import OfBatch, Params, PyTree

T = TypeVar("T")
_ARGS = (OfBatch.__doc__ or "").partition("\n\n    Args:")


def of_batch(
    name: str,
    doc: str | None,
    net: Layer,
    f: Callable[[Params, Batch], T],
) -> OfBatch[T]:
    """Return f as a plain function of params and a batch, under the name of its maker.

    Args:
        name: the maker's name, for ``help``, ``repr`` and error messages.
        doc: the function's docstring.
        net: the network.
        f: a function of (params, batch), whose params hold the side inputs.
    """

    def function(
        params: Params,
        x: PyTree,
        target: PyTree = None,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> T:
        bound = net.bind(params, key=key, mask=mask)
        return f(bound, weighted_batch(net, bound, x, target, key, weights, divisor))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc and "".join((doc.split("\n\n    Attributes:")[0], *_ARGS[1:]))
    del function.__annotations__["return"]
    return function
