"""The inputs of attention, split into heads, and their cotangents joined again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import wide
from jaxprop.core.describe import shapes
from jaxprop.core.tree import Mask
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.layers.scores import Heads, ScoreMask

if TYPE_CHECKING:
    from jaxprop.layers.attention import Attention


class Inputs(NamedTuple):
    """The parts of attention's x, or of its cotangent.

    Attributes:
        x: (N, T, C), q, k and v packed, or q alone if there is a memory.
        memory: (N, S, 2 kv_heads d), k and v packed; None if they are in x.
        bias: (N, heads or 1, T, S), added to the scores; None for nothing.
    """

    x: Array
    memory: Array | None = None
    bias: Array | None = None

    @classmethod
    def of(cls, x: PyTree) -> Inputs:
        x, *beside = x if isinstance(x, tuple) else (x,)
        return cls(x, **{"memory" if z.ndim == 3 else "bias": z for z in beside})

    def like(self, x: PyTree) -> Cotangent:
        """Return the parts with the structure and the dtypes of x."""
        parts = [part for part in self if part is not None]
        if not isinstance(x, tuple):
            return parts[0].astype(x.dtype)
        return tuple(part.astype(z.dtype) for part, z in zip(parts, x, strict=True))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, T and S."""
        n, t, _ = self.x.shape
        return n, t, t if self.memory is None else self.memory.shape[1]


def check_inputs(layer: Attention, x: PyTree) -> None:
    """Raise unless x is what ``Attention`` takes."""
    parts = x if type(x) is tuple else (x,)
    ranks = [getattr(part, "ndim", None) for part in parts]
    known = ([3, 4], [3, 3], [3, 3, 4]) if isinstance(x, tuple) else ([3],)
    if ranks not in known or not _fits(layer, Inputs.of(x)):
        heads, groups = layer.heads, layer.groups
        packed = "3D), q, k and v packed" if groups == 1 else "D + 2 kv_heads d), q, k and v packed"
        here = f"{layer} takes x of shape (N, T, {packed}, with {heads} heads dividing D"
        pairs = (
            ", or a tuple: (x, bias), (queries, memory) or (queries, memory, bias), of (N, T, D), "
            "(N, S, 2 kv_heads d) and (N, heads or 1, T, S)"
        )
        raise ValueError(f"{here}{pairs if isinstance(x, tuple) else ''}, not {shapes(x)}")
    for part in parts:
        if not jnp.issubdtype(part.dtype, jnp.floating):
            raise TypeError(f"{layer} takes floating x, not {part.dtype}")
    if ranks[1:2] == [3] and (layer.causal or layer.window is not None):
        raise ValueError(
            f"{layer}: the positions of a memory do not stand before or near those of the queries; "
            "write causal=False, and no window"
        )


def _fits(layer: Attention, x: Inputs) -> bool:
    n, t, s = x.sizes
    q_heads, kv_heads = layer.heads, layer.heads // layer.groups
    width = q_heads + (2 * kv_heads if x.memory is None else 0)
    d, rest = divmod(x.x.shape[2], width)
    return (
        not rest
        and all((d, t, s))
        and (x.memory is None or x.memory.shape == (n, s, 2 * kv_heads * d))
        and (x.bias is None or x.bias.shape in ((n, q_heads, t, s), (n, 1, t, s)))
    )


def mask_of_scores(layer: Attention, params: Params, x: Inputs) -> ScoreMask | None:
    """Return the mask given as params, (N, heads or 1, T or 1, S), False for hidden keys, or None.

    Raises:
        ValueError: for a mask of a shape that ``Attention`` does not take.
    """
    if not isinstance(params, Mask):
        return None
    mask = params.value
    n, t, s = x.sizes
    if mask.shape == (n, s):
        return mask[:, None, None]
    if mask.shape == (n, t, s):
        return mask[:, None]
    if mask.shape in ((n, layer.heads, t, s), (n, 1, t, s)):
        return mask
    hint = f"; one for all examples is jnp.broadcast_to(mask, ({n}, {t}, {s}))"
    raise ValueError(
        f"{layer}: the mask is {shapes(mask)}, but an input {shapes(x.x)} takes a padding mask "
        f"bool{[n, s]}, True where a position is real, or bool{[n, t, s]} or "
        f"bool{[n, layer.heads, t, s]}, True where a query sees a key"
        f"{hint if mask.shape in ((t, s), (1, t, s)) else ''}"
    )


def selected(layer: Attention, x: Inputs, mask: ScoreMask | None) -> Inputs:
    """Return x, or its cotangent, with zeros at queries that see no key and at keys never seen.

    Without a memory, a padded position is both a query and a key. A padded query's bias is 0.
    """
    if mask is None:
        return x
    _, t, s = x.sizes
    if mask.shape[1:3] == (1, 1):
        keys = mask[:, 0, 0]
        if x.memory is None:
            bias = None if x.bias is None else _zeroed(keys[:, None], x.bias)
            return x._replace(x=_zeroed(keys, x.x), bias=bias)
        return x._replace(memory=_zeroed(keys, x.memory))
    near = layer.sight.sees(positions(0, t) - positions(0, s).mT)
    seen = mask if near is None else mask & near
    queries, keys = seen.any((1, 3)), seen.any((1, 2))
    if x.memory is not None:
        return x._replace(x=_zeroed(queries, x.x), memory=_zeroed(keys, x.memory))
    q, k, v = _apart(layer, x)
    parts = [_zeroed(queries, q), _zeroed(keys, k), _zeroed(keys, v)]
    return x._replace(x=jnp.concatenate(parts, -1))


def split(layer: Attention, x: Inputs) -> tuple[Heads, Heads, Heads]:
    """Return scale q, k and v, each (N, heads, positions, d), with kv_heads heads in k and v."""
    kv_heads = layer.heads // layer.groups
    apart = zip(_apart(layer, x), (layer.heads, kv_heads, kv_heads), strict=True)
    q, k, v = (
        z.reshape(*z.shape[:2], heads, z.shape[-1] // heads).swapaxes(1, 2) for z, heads in apart
    )
    return (wide(q) * scale(q)).astype(q.dtype), k, v


def joined(layer: Attention, x: Inputs, d_q: Heads, d_k: Heads, d_v: Heads) -> Inputs:
    """Return the cotangents, each (N, heads, positions, d), packed as ``split`` found q, k and v.

    The cotangent of a key or a value is summed over the query heads of its group.
    """
    if layer.groups > 1:
        kv_heads = layer.heads // layer.groups
        apart = kv_heads, layer.groups
        d_k, d_v = (z.reshape(z.shape[0], *apart, *z.shape[2:]).sum(2) for z in (d_k, d_v))
    d_q, d_k, d_v = (merged(z.swapaxes(1, 2)) for z in (d_q, d_k, d_v))
    if x.memory is not None:
        return Inputs(d_q, jnp.concatenate([d_k, d_v], -1))
    return Inputs(jnp.concatenate([d_q, d_k, d_v], -1))


def merged(parts: Float[Array, "n t ..."]) -> Float[Array, "n t d"]:
    """Return the parts of each position, such as its heads, joined on one axis."""
    n, t, *sizes = parts.shape
    return parts.reshape(n, t, math.prod(sizes))


def scale(q: Heads) -> float:
    """Return 1 / sqrt(d)."""
    return 1 / math.sqrt(q.shape[-1])


def positions(start: int, stop: int) -> Array:
    """Return the positions of queries, (1, 1, T, 1), along the axes of the scores."""
    return jnp.arange(start, stop).reshape(1, 1, -1, 1)


def _apart(layer: Attention, x: Inputs) -> list[Array]:
    """Return q, k and v, each with its heads side by side, (N, positions, heads d)."""
    if x.memory is not None:
        return [x.x, *jnp.split(x.memory, 2, -1)]
    width = x.x.shape[-1] // (layer.groups + 2)  # of k, and of v
    return jnp.split(x.x, [layer.groups * width, (layer.groups + 1) * width], -1)


def _zeroed(real: Bool[Array, "... t"], x: Float[Array, "... t c"]) -> Float[Array, "... t c"]:
    return jnp.where(real[..., None], x, 0)
