"""Micro-batches: the parts of a batch, processed one after the other in the memory of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import wide
from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_count
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Key, Mask, is_not_learned
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.base import is_marked

Parts = Callable[[Params, Batch], PyTree]
"""A function of (params, batch) whose result for a batch can be assembled from those for its parts:
its arrays are means over examples, or marked as ``PerExample``."""


def in_micro_batches(net: Layer, parts: Parts, micro_batches: int) -> Parts:
    """Return a function with the result of ``parts``, in the memory of one micro-batch.

    Part i of the batch is ``x[i::micro_batches]``, so that if the batch is sharded over devices,
    each part is too. Results are summed in at least float32, and rounded to their dtype at the end.
    Each part has its own keys, folded from those of the batch.

    Args:
        net: the network.
        parts: the function to call on each micro-batch.
        micro_batches: how many there are; the N examples must divide into them.

    Raises:
        TypeError: for micro_batches that is not a whole number.
        ValueError: for micro_batches below 1, and for a net that couples the examples of a batch.
    """
    check_count("micro_batches", micro_batches)
    if micro_batches == 1:
        return parts
    check_apart(net)

    def accumulated(params: Params, batch: Batch) -> PyTree:
        batch = dividing(batch, micro_batches)
        check_uncoupled(net, params, batch.x)
        whole = jax.eval_shape(lambda: parts(params, batch))
        pieces = _pieces(whole, micro_batches)

        def add(totals: list[Array], i: Array) -> tuple[list[Array], None]:
            of_part = parts(*part(params, batch, i, micro_batches))
            each = zip(pieces, totals, jax.tree.leaves(of_part), strict=True)
            return [piece.add(total, leaf, i) for piece, total, leaf in each], None

        start = [piece.start() for piece in pieces]
        totals, _ = jax.lax.scan(add, start, jnp.arange(micro_batches))
        ends = [piece.end(total) for piece, total in zip(pieces, totals, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(whole), ends)

    return accumulated


def dividing(batch: Batch, micro_batches: int) -> Batch:
    """Return the batch with a divisor such that its mean is the mean of its parts' means.

    Raises:
        ValueError: unless the examples divide into that many equal parts.
    """
    check_examples((batch.x, batch.target), micro_batches)
    if batch.weights is None and batch.divisor is None:
        return batch._replace(whole=False)
    divisor = batch.examples(jax.tree.leaves(batch.x)[0].shape[0]).divisor
    return batch._replace(divisor=divisor / micro_batches, whole=False)


def part(params: Params, batch: Batch, i: Array | int, micro_batches: int) -> tuple[Params, Batch]:
    """Return the arguments of the i-th micro-batch: its examples, and its own masks and keys."""

    def of(node: Any) -> Any:
        if isinstance(node, Mask):
            return node.of(_every(node.value, node.axis, i, micro_batches))
        if isinstance(node, Key):
            return Key(_folded(node.value, i))
        return node

    x, target, weights = jax.tree.map(
        lambda leaf: _every(leaf, 0, i, micro_batches), (batch.x, batch.target, batch.weights)
    )
    key = None if batch.key is None else jax.random.fold_in(batch.key, i)
    params = jax.tree.map(of, params, is_leaf=is_not_learned)
    return params, Batch(x, target, key, weights, batch.divisor, whole=False)


def check_apart(net: Layer) -> None:
    """Raise ``ValueError`` for a net that couples the examples of a batch."""
    if net.batch_coupled:
        raise ValueError(
            f"{net} couples the examples of a batch: those of a micro-batch would not meet "
            "the others, and the result would not be that of the batch"
        )


def check_examples(batch: PyTree, micro_batches: int) -> None:
    """Raise ``ValueError`` unless a batch's examples divide into that many equal parts."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "micro_batches: axis 0 of every leaf of x and target is the example, but they are "
            f"{shapes(batch)}"
        )
    ((examples,),) = sizes
    if examples % micro_batches:
        raise ValueError(
            f"micro_batches: {examples} examples do not divide into {micro_batches} equal "
            "micro-batches"
        )


class _Piece(NamedTuple):
    """One array of the batch's result, and how to assemble it from those of the micro-batches.

    Attributes:
        name: its name, for messages.
        whole: its shape and dtype for the batch.
        axis: the example axis; None for a mean over examples.
        micro_batches: how many micro-batches there are.
    """

    name: str
    whole: jax.ShapeDtypeStruct
    axis: int | None
    micro_batches: int

    def start(self) -> Array:
        if self.axis is not None:
            return _split(jnp.zeros_like(self.whole), self.axis, self.micro_batches)
        if not jnp.issubdtype(self.whole.dtype, jnp.inexact):
            raise TypeError(f"{self.name} is {self.whole.dtype}, which has no mean to accumulate")
        return wide(jnp.zeros_like(self.whole))

    def add(self, total: Array, leaf: Array, i: Array) -> Array:
        shape = list(self.whole.shape)
        if self.axis is not None:
            shape[self.axis] //= self.micro_batches
        if leaf.shape != tuple(shape):
            raise ValueError(
                f"{self.name} is {self.whole.shape} for the batch and {leaf.shape} for one of its "
                f"{self.micro_batches} micro-batches: it is not a mean over examples, nor marked "
                "jp.quantity.PerExample"
            )
        if self.axis is None:
            return total + wide(leaf)
        return jax.lax.dynamic_update_index_in_dim(total, leaf, i, self.axis + 1)

    def end(self, total: Array) -> Array:
        if self.axis is not None:
            return total.reshape(self.whole.shape)
        return (total / self.micro_batches).astype(self.whole.dtype)


def _pieces(whole: PyTree, micro_batches: int) -> list[_Piece]:
    return [
        _Piece(
            f"micro_batches: result{jax.tree_util.keystr(path[1:])}",
            struct,
            node.axis % struct.ndim if is_marked(node) else None,
            micro_batches,
        )
        for path, node in jax.tree.leaves_with_path(whole, is_leaf=is_marked)
        for struct in jax.tree.leaves(node)
    ]


def _folded(keys: Array, i: Array | int) -> Array:
    """Return keys of any shape, each folded with i."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), i).reshape(keys.shape)


def _every(leaf: Any, axis: int, i: Array | int, micro_batches: int) -> Array:
    """Return leaf[i::micro_batches] along the axis."""
    parts = _split(jnp.asarray(leaf), axis, micro_batches)
    return jax.lax.dynamic_index_in_dim(parts, i, axis + 1, keepdims=False)


def _split(leaf: Array, axis: int, micro_batches: int) -> Array:
    each = leaf.shape[axis] // micro_batches
    return leaf.reshape(*leaf.shape[:axis], each, micro_batches, *leaf.shape[axis + 1 :])
