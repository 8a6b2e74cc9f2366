"""Attention, with its softmax weights saved for backward or recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
from jaxprop.core.checks import check_count, check_counts, check_flags
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask, SideInput
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.layers import by_parts
from jaxprop.layers.heads import (
    Inputs,
    check_inputs,
    joined,
    mask_of_scores,
    merged,
    scale,
    selected,
)
from jaxprop.layers.scores import ScoreMask, Sight

Save = Literal["weights", "logsumexp"]


class Attention(Layer):
    """Attention, y = softmax(q k^T / sqrt(d) + bias) v for each head, with q, k and v packed in x.

    With s = scale q k^T + bias, p = softmax(s) over the keys and y = p v, the chain rule gives

        dE/dv = p^T ct
        dE/dp = ct v^T
        dE/ds = p (dE/dp - sum over keys of p dE/dp)    softmax's Jacobian is diag(p) - p p^T
              = p (dE/dp - <ct, y>)                     as sum_k p_k <ct, v_k> = <ct, y>
        dE/dq = scale dE/ds k
        dE/dk = scale dE/ds^T q
        dE/dbias = dE/ds

    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762). The transpose of a copy is a sum: dE/dk
    and dE/dv are summed over the query heads that share a key (``kv_heads``; Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245), and dE/dbias over the heads if they share one bias. ``save``
    names the residuals:

    - ``"weights"``: e = exp(s - max s) and 1 / sum e, which multiplies y and ct instead of e.
      Nothing is computed twice. Causal queries are split into up to 8 parts, each with only the
      keys up to its last query. That takes little more than half of the N heads T^2 numbers, and of
      the work. With a window, for either ``save``, a part has only the keys near it.
    - ``"logsumexp"``: log sum exp s, (N, heads, T). backward recomputes p = exp(s - logsumexp) for
      ``block`` queries at a time, at the cost of one more product. Memory is linear in T (Rabe and
      Staats 2021, https://arxiv.org/abs/2112.05682; Dao et al. 2022,
      https://arxiv.org/abs/2205.14135), except for a bias and a full mask, which are not. For GPUs
      and TPUs there are kernels (``layers/flash.py``), whose scores never leave the chip.

    x is (N, T, D + 2 kv_heads d), floating, with d = D / heads features per head: the D features of
    q, then those of k, then those of v, each with its heads one after the other. Without
    ``kv_heads`` that is (N, T, 3D). x may also be a tuple:

    - ``(x, bias)``, with the bias (N, heads, T, T), or (N, 1, T, T) shared by all heads. Where it
      is -inf, a key is not seen. A learned bias is a layer before this one, in a ``jp.branch(...,
      join="tuple")`` next to the layer that makes x.
    - ``(queries, memory)`` for cross attention: (N, T, D) and (N, S, 2 kv_heads d), k and v packed.
    - ``(queries, memory, bias)``.

    y is (N, T, D), and scale is 1 / sqrt(d). The softmax is computed in at least float32.

    There is nothing to learn: params are ``()``, or a ``jp.Mask`` that ``net.bind(params, mask=)``
    puts in their place. A padding mask is (N, T), or (N, S) for a memory: padded positions count as
    zeros, whatever x holds there, and get no weight as keys. A full mask, (N, T, S) or
    (N, heads, T, S), says which query sees which key; keys that no query sees count as zeros. A
    mask shared by all examples is written ``jnp.broadcast_to(mask, (N, T, S))``, since one with two
    axes is a padding mask. For a query that sees no key, y and the cotangents are 0.

    Args:
        heads: the number of heads, which divides D.
        causal: whether position t attends only to the positions up to t.
        save: the residuals, "weights" or "logsumexp".
        block: the largest number of queries that "logsumexp" handles at a time.
        kv_heads: the number of heads of k and of v, each shared by equally many neighbouring heads
            of q; None for ``heads``, 1 for multi-query attention.
        window: how many positions, up to its own, a position attends to; without ``causal``, also
            as many from its own on. None for all.
        masked: whether the layer takes the step's mask. Use False for a layer whose keys the mask
            does not describe, such as a decoder's self-attention where the memory is padded.
        kernels: whether "logsumexp" uses hand-written kernels where there are any: True for always,
            False for never (XLA computes it), None for always unless JAX's default device is a CPU.
            There are kernels for GPUs of compute capability 8.0 and later (float32, bfloat16,
            float16) and for TPUs (float32, bfloat16; in a program for one device, or in
            ``jax.shard_map``), for inputs without a bias or a full mask. A program compiled for
            another device than the default one needs True. ``jax.export`` needs False, or a program
            for one GPU with its check of custom calls disabled. ``jax.grad`` of the layer
            differentiates what XLA computes.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for a number below 1, kv_heads that do not divide the heads, or another
            ``save``; for x of other shapes, a mask of another shape, and a memory where the layer
            is causal or has a window.
    """

    heads: int
    causal: bool = True
    save: Save = "weights"
    block: int = 128
    kv_heads: int | None = None
    window: int | None = None
    masked: bool = True
    kernels: bool | None = None

    def __post_init__(self) -> None:
        check_counts(self, "heads", "block")
        check_flags(self, "causal", "masked")
        if self.kernels is not None:
            check_flags(self, "kernels")
        if self.save not in ("weights", "logsumexp"):
            raise ValueError(f"Attention: save is 'weights' or 'logsumexp', not {self.save!r}")
        for name in ("kv_heads", "window"):
            if getattr(self, name) is not None:
                check_count(f"Attention: {name}", getattr(self, name))
        if self.heads % (self.kv_heads or 1):
            raise ValueError(
                f"Attention: kv_heads divides the {self.heads} heads, but is {self.kv_heads}"
            )

    @property
    def takes(self) -> type[SideInput] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Mask if self.masked else None

    @property
    def groups(self) -> int:
        """The number of heads of q that share one head of k and v."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def sight(self) -> Sight:
        """The range of positions that a query sees."""
        far = None if self.window is None else self.window - 1
        return Sight(far, 0 if self.causal else far)

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_inputs(self, x)
        return ()

    def forward(self, params: Params, x: PyTree) -> tuple[Float[Array, "n t d"], Residuals]:
        given = Inputs.of(x)
        mask = mask_of_scores(self, params, given)
        given = selected(self, given, mask)
        y, kept = self._half("attend", given, mask)
        y = merged(y.swapaxes(1, 2))
        return y, (x if mask is None else given.like(x), y, kept)

    def backward(
        self, params: Params, residuals: Residuals, ct: Float[Array, "n t d"]
    ) -> tuple[tuple[()], Cotangent]:
        x, y, kept = residuals
        given = Inputs.of(x)
        n, t, _ = given.sizes
        if ct.shape != y.shape:
            raise ValueError(f"{self}: ct has shape {ct.shape}, but y has {y.shape}")
        mask = mask_of_scores(self, params, given)
        d = y.shape[-1] // self.heads
        ct, y = (z.reshape(n, t, self.heads, d).swapaxes(1, 2) for z in (ct, y))
        mean = jnp.sum(wide(ct) * wide(y), -1, keepdims=True)
        d_q, d_k, d_v, d_bias = self._half("pull", given, mask, ct, mean, kept)
        d_x = joined(self, given, d_q * scale(d_q), d_k, d_v)._replace(bias=d_bias)
        return (), selected(self, d_x, mask).like(x)

    def _half(
        self, half: Literal["attend", "pull"], x: Inputs, mask: ScoreMask | None, *args: PyTree
    ) -> PyTree:
        """Return the half that needs the scores, by XLA, or by kernels where there are any."""
        by_xla = functools.partial(getattr(by_parts, half), self)
        wanted = jax.default_backend() != "cpu" if self.kernels is None else self.kernels
        if self.save == "weights" or not wanted:
            return by_xla(x, mask, *args)
        from jaxprop.layers import flash, on_chip  # imports Pallas, which takes time

        kernels: dict[on_chip.Platform, Callable[..., PyTree]] = {
            platform: functools.partial(getattr(flash, half), self, platform)
            for platform in flash.platforms(self, x, mask)
        }
        return on_chip.instead(by_xla, kernels, x, mask, *args)
