"""The params of an affine map, shared by dense layers and convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxprop.core.serialization import serializable


@serializable
class AffineParams(NamedTuple):
    """The params of an affine layer, or their cotangents.

    Attributes:
        w: the weights, (I, O); in a convolution (*window, C / groups, O).
        b: the bias, (O,); None in a layer without one.
    """

    w: Any
    b: Any = None
