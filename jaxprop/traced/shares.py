"""Forms from what was tapped: the data at each use of a param, and the cotangent of the result."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import of_indices, wide
from jaxprop.core.forms import (
    Factored,
    Joint,
    Moves,
    OfX,
    Outer,
    Rearranged,
    Repeated,
    Reshaped,
    Stacked,
    Transposed,
    gram,
    in_place,
    joint,
    of_real,
)
from jaxprop.core.serialization import serializable
from jaxprop.layers.embedding import Rows
from jaxprop.layers.patches import Patches
from jaxprop.layers.windows import Windows
from jaxprop.traced.equations import Convolution
from jaxprop.traced.taps import LookUp, MatrixProduct, Use, Watched
from jaxprop.traced.views import ParamPart


@serializable
class Own(Stacked):
    """The form of a param that keeps each example's own share g_n.

    Its rows, along the last axis, are taken as independent: as the positions of a product whose x
    is the identity. A learned position embedding that is added to x has exactly these factors.
    """

    is_pair: ClassVar[bool] = True

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        rows = math.prod(self.g.shape[1:-1])
        ones = jnp.ones(self.g.shape[0], wide(self.g).dtype)
        one = of_real(ones, real, weights) ** 2
        diagonal = jnp.full((rows,), one.sum())
        return OfX(diagonal.reshape(1, 1) if rows == 1 else diagonal, one.sum() * rows)

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Own:
        """Return the form itself: each of its rows is one position already."""
        return self

    def gram_of_ct(self) -> Float[Array, "o o"]:
        return gram(self.g[:, None] if self.g.ndim == 1 else self.g)


def share(use: Use, part: ParamPart, x: Array, ct: Array) -> tuple[Factored, Moves]:
    """Return the form of one param's part in a use, and the moves that led from the param to it.

    Args:
        use: the use.
        part: the param's part in it.
        x: (N, *scans, ...), the data at each step of the scans that the use is in.
        ct: (N, *scans, ...), the cotangent of the result.
    """
    assert not isinstance(use.meeting, Watched)
    if not isinstance(use.meeting, LookUp):  # a result may have a wider dtype than its operands
        wider = max(x.dtype, ct.dtype, key=lambda dtype: dtype.itemsize)
        x, ct = x.astype(wider), ct.astype(wider)
    match use.meeting:
        case MatrixProduct() as product:
            form, moves = _of_product(product, use, part, x, ct)
        case Convolution() as convolution:
            form, moves = _of_convolution(convolution, use, x, ct)
        case LookUp() as look_up:
            form, moves = _of_look_up(look_up, use, x, ct)
    axis = part.layers
    if axis is not None:
        form = jax.tree.map(lambda factor: _cut(factor, axis, part), form)
    return form, (*part.moves, *moves)


def together(shares: list[tuple[Factored, Moves]]) -> Factored:
    """Return the form of a param from the forms of its uses.

    Uses are joined if their moves and the shapes of their shares agree: a vector may be used as a
    row and as a column.
    """
    if len(shares) == 1:
        ((form, moves),) = shares
        return form if in_place(moves) else Rearranged(form, moves)
    alike: dict[tuple[Moves, tuple[int, ...]], list[Factored]] = {}
    for form, moves in shares:
        shape = jax.eval_shape(lambda form: form.per_example(), form).shape[1:]
        alike.setdefault((moves, shape), []).append(form)
    forms = [
        joint(tuple(forms)) if in_place(moves) else Rearranged(joint(tuple(forms)), moves)
        for (moves, _), forms in alike.items()
    ]
    return forms[0] if len(forms) == 1 else Joint(tuple(forms))


def _of_product(
    product: MatrixProduct, use: Use, part: ParamPart, x: Array, ct: Array
) -> tuple[Factored, Moves]:
    (in_x, in_w), (batch_x, batch_w) = product.dot
    lead, order = 1 + len(use.scans), [*batch_w, *in_w]
    free_w = [axis for axis in range(len(use.shape)) if axis not in order]
    free_x = [axis for axis in range(x.ndim - lead) if axis not in (*batch_x, *in_x)]
    order += free_w
    batches, free = len(batch_w), len(free_x)
    x = jnp.transpose(x, (*range(lead), *(lead + a for a in (*batch_x, *free_x, *in_x))))
    if not product.data_first:  # its result has the free axes of w before those of x
        start = lead + batches
        ct = jnp.moveaxis(ct, range(start, start + len(free_w)), range(-len(free_w), 0))
    shape = list(use.shape)
    if use.joined is not None:
        shape[use.joined] = part.stop - part.start
        at = order.index(use.joined)
        if at < batches + len(in_w):
            x = _cut(x, lead + at + (free if at >= batches else 0), part)
        if not batches <= at < batches + len(in_w):
            ct = _cut(ct, lead + at + (free - len(in_w) if at >= batches else 0), part)
    shape = [shape[axis] for axis in order]
    i, o = math.prod(shape[batches : batches + len(in_w)]), math.prod(shape[batches + len(in_w) :])

    def rows(a: Array, last: int, features: int) -> Array:
        """Return (layers ..., batch, N, positions, features), without an axis for one position.

        Args:
            a: the data or the cotangent.
            last: how many of its last axes make up the features.
            features: the product of their sizes.
        """
        a = _layers_first(a, use.scans)
        layers = sum(use.scans)
        of_batch = a.shape[lead : lead + batches]
        a = jnp.moveaxis(a, range(lead, lead + batches), range(layers, layers + batches))
        flat = (math.prod(of_batch),) if batches else ()
        n = a.shape[layers + batches]
        positions = math.prod(a.shape[layers + batches + 1 : a.ndim - last])
        length = () if positions == 1 else (positions,)
        return a.reshape(*a.shape[:layers], *flat, n, *length, features)

    form: Factored = Outer(rows(x, len(in_w), i), rows(ct, len(free_w), o))
    for _ in range(sum(use.scans) + bool(batches)):
        form = Repeated(form)
    after = ((math.prod(shape[:batches]),) if batches else ()) + (i, o)
    moves: Moves = ()
    if order != sorted(order):
        moves += (Transposed(tuple(order)),)
    if tuple(shape) != after:
        moves += (Reshaped(tuple(shape)),)
    return form, moves


def _of_convolution(
    convolution: Convolution, use: Use, x: Array, ct: Array
) -> tuple[Factored, Moves]:
    lead, layers = 1 + len(use.scans), sum(use.scans)
    features, channels, *spatial = convolution.w

    def frames(a: Array, layout: tuple[int, ...]) -> Array:
        """Return (layers ..., N, frames, *spatial, channels), with all other axes in frames."""
        batch, channel, *places = layout
        order = (*range(lead), *(lead + axis for axis in (batch, *places, channel)))
        a = _layers_first(jnp.transpose(a, order), use.scans)
        kept = a.shape[lead + 1 :]
        return a.reshape(*a.shape[: layers + 1], math.prod(a.shape[layers + 1 : lead + 1]), *kept)

    x, ct = frames(x, convolution.x), frames(ct, convolution.y)
    moves: Moves = ()
    order = (*spatial, channels, features)
    if order != tuple(range(len(order))):
        moves += (Transposed(order),)
    shape = tuple(use.shape[axis] for axis in order)
    windows = Windows(
        shape[:-2],
        convolution.strides,
        convolution.padding,
        convolution.dilation,
        convolution.spread,
    )
    if x.shape[layers + 1] == 1:
        x, ct = (jnp.squeeze(a, layers + 1) for a in (x, ct))
    else:
        windows = Windows(
            (1, *windows.window),
            (1, *windows.strides),
            ((0, 0), *windows.padding),
            (1, *windows.dilation),
            (1, *windows.spread),
        )
        moves += (Reshaped(shape),)
    form: Factored = Patches(x, ct, windows, convolution.groups)
    for _ in range(layers):
        form = Repeated(form)
    return form, moves


def _of_look_up(look_up: LookUp, use: Use, ids: Array, ct: Array) -> tuple[Factored, Moves]:
    layers = sum(use.scans)
    vocab, *row = use.shape
    ids = _layers_first(ids[..., 0], use.scans)
    ids = ids.reshape(*ids.shape[: layers + 1], math.prod(ids.shape[layers + 1 :]))
    ct = _layers_first(ct, use.scans)
    ct = ct.reshape(*ids.shape, math.prod(row))
    if look_up.clipped:
        ids = jnp.clip(of_indices(ids), 0, vocab - 1)
    form: Factored = Rows(ids, ct, vocab)
    for _ in range(layers):
        form = Repeated(form)
    return form, () if len(row) == 1 else (Reshaped(tuple(use.shape)),)


def _layers_first(a: Array, scans: tuple[bool, ...]) -> Array:
    """Return an array (N, *scans, ...) with the axes of scans over layers before N."""
    at = [1 + index for index, layers in enumerate(scans) if layers]
    return jnp.moveaxis(a, at, range(len(at)))


def _cut(a: Array, axis: int, part: ParamPart) -> Array:
    return jax.lax.slice_in_dim(a, part.start, part.stop, axis=axis)
