"""Extra quantities, computed in the walk of a gradient and returned in its aux."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from jaxprop.core.batch import Batch
from jaxprop.core.checks import given
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Params
from jaxprop.quantity.base import Quantity
from jaxprop.quantity.together import together


def alongside(
    net: Layer,
    loss: Loss,
    own: Mapping[str, Quantity],
    also: Mapping[str, Quantity] | None,
    micro_batches: int,
    aux: bool,
    loss_scale: float | Array = 1.0,
) -> Callable[[Params, Batch], tuple[dict[str, Any], dict[str, Any] | None]]:
    """Return a function of (params, batch) that computes its own quantities and the user's.

    Args:
        net: the network.
        loss: the loss.
        own: the function's own quantities, by name.
        also: the extra quantities that the user requested, by name, or None.
        micro_batches: as in ``together``.
        aux: whether the user's function returns a ``jp.Aux``, which is where ``also`` comes back.
        loss_scale: as in ``together``.

    Raises:
        TypeError: for ``also`` that is not a dict of quantities.
        ValueError: for ``also`` without ``aux``.
    """
    if also is not None and not isinstance(also, Mapping):
        raise TypeError(f"also is a dict of quantities by name, not {given(also)}")
    if also is not None and not aux:
        raise ValueError("also: the quantities come back in aux; ask for aux=True too")
    names = {name: f"also[{name!r}]" for name in also or {}}
    asked = {**own, **{names[name]: quantity for name, quantity in (also or {}).items()}}
    f = together(net, loss, asked, micro_batches, loss_scale)

    def of_both(params: Params, batch: Batch) -> tuple[dict[str, Any], dict[str, Any] | None]:
        result = f(params, batch)
        quantities = {name: result.pop(long) for name, long in names.items()}
        return result, None if also is None else quantities

    return of_both
