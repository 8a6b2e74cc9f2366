"""The by-products of a step, which come with the loss and the gradient from the same walk."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float

from jaxprop.core.serialization import serializable
from jaxprop.core.types import PyTree


@serializable
class Aux(NamedTuple):
    """The by-products of a step; a field is None where the step did not need it.

    Attributes:
        y: the net's output, to compute an accuracy, say.
        norms: (N,), the norm of each example's gradient before it was clipped; with ``per_layer``
            like params, with (N,) in place of each layer's params, (L, N) inside ``repeat``.
        clipped: the share of examples whose gradient was clipped; with ``per_layer`` one for each
            layer, in the same structure.
        norm: the norm of the gradient before ``max_norm`` bounded it, from an update that needs it
            (``max_norm``, ``skip_nonfinite``, ``jp.DynamicLossScale``).
        also: the extra quantities that ``also=`` requested, by name.
    """

    y: PyTree
    norms: Float[Array, " n"] | PyTree = None
    clipped: Float[Array, ""] | PyTree = None
    norm: Float[Array, ""] | None = None
    also: dict[str, Any] | None = None
