"""A recurrent layer in both directions of time."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxprop.combinators.branch import Branch
from jaxprop.core.checks import require
from jaxprop.core.layer import Layer


def bidirectional(layer: Layer) -> Branch:
    """Return the layer and its reverse on the same x, with their features concatenated.

    The result is a ``branch`` of two layers, each with its own params. y is (N, T, 2 F), or the two
    last states, (N, 2 F), for ``output="last"``. Both layers take the mask.

    Args:
        layer: an ``Rnn``, ``Lstm`` or ``Gru``, or another layer with a field ``reverse``.

    Raises:
        TypeError: for a layer that has no direction.
        ValueError: for a layer whose output is "both".

    Example:
        >>> import jaxprop as jp
        >>> jp.bidirectional(jp.Gru(8, output="last"))
        branch(Gru(8, output='last'), Gru(8, reverse=True, output='last'), join='concatenate')
    """
    require(layer, Layer, "bidirectional: the layer")
    turned: Any = layer
    if not isinstance(getattr(layer, "reverse", None), bool):
        raise TypeError(f"bidirectional takes a layer with a field reverse, not {layer}")
    if getattr(layer, "output", None) == "both":
        raise ValueError(f'bidirectional takes an output of "sequence" or "last", not {layer}')
    return Branch((layer, dataclasses.replace(turned, reverse=not turned.reverse)), "concatenate")
