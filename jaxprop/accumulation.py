"""Gradient accumulation: a batch in micro-batches, one after the other, in the memory of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.backprop import walk
from jaxprop.factored import wide
from jaxprop.layer import Layer
from jaxprop.of_batch import OfBatch, is_marked, with_key
from jaxprop.seats import is_key, is_mask
from jaxprop.shapes import check_count, shapes


def accumulate(
    maker: Callable[..., Callable[..., Any]], micro_batches: int
) -> Callable[..., Callable[..., Any]]:
    """``maker``, with what it makes going through a batch in micro-batches, in the memory of one.

    The result is that of the whole batch, whatever is asked: norms, clipping, the noise of DP-SGD
    (drawn once), and what is not linear in the examples, as a variance.

    Args:
        maker: a function of (net, loss, ...) that returns a function of (params, x, target) or
            (params, x, target, key), as ``jp.value_and_grad``, ``jp.clipped_grad``, ``jp.variance``
            or ``jp.quantities``. One of your own works where what its function returns is a mean
            over examples, as ``lambda net, loss: jax.value_and_grad(jp.loss_fn(net, loss))``, and
            nothing tells it from one that returns something else: wrap what ``accumulate`` makes
            in functions of yours, not what it is given. (``jax.jit`` is seen through.) What
            is of pairs of examples (``jp.gram``) raises ``ValueError``: those of two micro-batches
            never meet.
        micro_batches: into how many equal parts the N examples (axis 0 of every leaf of x and
            target, and of a mask in its seat) are split; another N raises ``ValueError``. Part i is
            ``x[i::micro_batches]``, so that a batch sharded over devices stays so in each part.

    What the micro-batches give is summed in at least float32 and rounded to its dtype at the end.
    Each has keys of its own, folded from the one in each seat (``net.given``) and from the one that
    samples curvature: other draws than those of the whole batch, of the same distribution. A layer
    that couples the examples of a batch, as BatchNorm in training, raises ``ValueError``; of a loss
    it is taken that an example's value is its own.

    Example:
        >>> import optax, jaxprop as jp
        >>> net, loss = jp.chain(jp.Dense(2)), jp.HalfSquaredError()
        >>> f = jp.accumulate(jp.clipped_grad, 4)(net, loss, max_norm=1.0)
        >>> update = jp.make_update(
        ...     net, loss, optax.sgd(0.1), value_and_grad=jp.accumulate(jp.value_and_grad, 8)
        ... )
    """
    check_count("accumulate: micro_batches", micro_batches)

    if maker is walk:
        raise TypeError(
            "accumulate: what a walk leaves need not be a mean over examples; write a jp.Quantity "
            "that takes it, for jp.quantities"
        )

    def make(net: Layer, loss: Any, *args: Any, **options: Any) -> Callable[..., Any]:
        if not isinstance(net, Layer):
            raise TypeError(
                "accumulate takes a maker, such as jp.value_and_grad, and is then called with a "
                f"net and a loss as that is; for the net it got {shapes(net)}"
            )
        of_batch = maker(net, loss, *args, **options)
        if micro_batches == 1:
            return of_batch
        of_batch = inspect.unwrap(of_batch, stop=lambda f: not isinstance(f, jax.stages.Wrapped))
        if net.batch_coupled:
            raise ValueError(
                f"{net} couples the examples of a batch: those of a micro-batch would not meet "
                "the others, and the result would be another than that of the batch"
            )
        whole = of_batch if isinstance(of_batch, OfBatch) else OfBatch(of_batch)
        return _accumulated(whole, micro_batches)

    return make


def _accumulated(of_batch: OfBatch, micro_batches: int) -> OfBatch:
    def accumulated(
        params: Any, x: Any, target: Any, key: chex.PRNGKey | None = None, **options: Any
    ) -> Any:
        _check_examples((x, target), micro_batches)
        given = with_key(key, options)
        structs = jax.eval_shape(lambda: of_batch.parts(params, x, target, **given))
        pieces = _pieces(structs, micro_batches)

        def add(totals: list[Array], i: Array) -> tuple[list[Array], None]:
            parts = of_batch.parts(
                jax.tree.map(lambda leaf: _of_seat(leaf, i, micro_batches), params),
                *jax.tree.map(lambda leaf: _every(leaf, 0, i, micro_batches), (x, target)),
                **with_key(None if key is None else jax.random.fold_in(key, i), options),
            )
            each = zip(pieces, totals, jax.tree.leaves(parts), strict=True)
            return [piece.add(total, part, i) for piece, total, part in each], None

        start = [piece.start() for piece in pieces]
        totals, _ = jax.lax.scan(add, start, jnp.arange(micro_batches))
        ends = [piece.end(total) for piece, total in zip(pieces, totals, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(structs), ends)

    return OfBatch(accumulated, of_batch.finish)


class _Piece(NamedTuple):
    """One array of the batch's parts, and how those of the micro-batches make it up."""

    name: str
    whole: jax.ShapeDtypeStruct
    axis: int | None  # that of the examples; None for a mean over them
    micro_batches: int

    def start(self) -> Array:
        if self.axis is not None:
            return _split(jnp.zeros_like(self.whole), self.axis, self.micro_batches)
        if not jnp.issubdtype(self.whole.dtype, jnp.inexact):
            raise TypeError(f"{self.name} is {self.whole.dtype}, which has no mean to accumulate")
        return wide(jnp.zeros_like(self.whole))

    def add(self, total: Array, part: Array, i: Array) -> Array:
        shape = list(self.whole.shape)
        if self.axis is not None:
            shape[self.axis] //= self.micro_batches
        if part.shape != tuple(shape):
            raise ValueError(
                f"{self.name} is {self.whole.shape} for the batch and {part.shape} for one of its "
                f"{self.micro_batches} micro-batches: it is not a mean over examples, nor marked "
                "jp.PerExample, and what is of pairs of examples does not come of micro-batches, "
                "since those of two never meet"
            )
        if self.axis is None:
            return total + wide(part)
        return jax.lax.dynamic_update_index_in_dim(total, part, i, self.axis + 1)

    def end(self, total: Array) -> Array:
        if self.axis is not None:
            return total.reshape(self.whole.shape)
        return (total / self.micro_batches).astype(self.whole.dtype)


def _pieces(structs: Any, micro_batches: int) -> list[_Piece]:
    return [
        _Piece(
            f"accumulate: result{jax.tree_util.keystr(path)}",
            struct,
            node.axis % struct.ndim if is_marked(node) else None,
            micro_batches,
        )
        for path, node in jax.tree.leaves_with_path(structs, is_leaf=is_marked)
        for struct in jax.tree.leaves(node)
    ]


def _check_examples(batch: Any, micro_batches: int) -> None:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "accumulate: axis 0 of every leaf of x and target is the example, but they are "
            f"{shapes(batch)}"
        )
    ((examples,),) = sizes
    if examples % micro_batches:
        raise ValueError(
            f"accumulate: {examples} examples do not divide into {micro_batches} equal "
            "micro-batches"
        )


def _of_seat(leaf: Any, i: Array, micro_batches: int) -> Any:
    """A param as it is, a key's i-th own, and of a mask (..., N, T) the part of micro-batch i."""
    if not hasattr(leaf, "dtype"):
        return leaf
    if is_mask(leaf):
        return _every(leaf, leaf.ndim - 2, i, micro_batches)
    if is_key(leaf):
        keys = jax.vmap(jax.random.fold_in, (0, None))(leaf.reshape(-1), i)
        return keys.reshape(leaf.shape)
    return leaf


def _every(leaf: Any, axis: int, i: Array, micro_batches: int) -> Array:
    """leaf[i::micro_batches] along the axis."""
    parts = _split(jnp.asarray(leaf), axis, micro_batches)
    return jax.lax.dynamic_index_in_dim(parts, i, axis + 1, keepdims=False)


def _split(leaf: Array, axis: int, micro_batches: int) -> Array:
    each = leaf.shape[axis] // micro_batches
    return leaf.reshape(*leaf.shape[:axis], each, micro_batches, *leaf.shape[axis + 1 :])
