"""Attention."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.layer import Layer, shapes


class Attention(Layer):
    """y = softmax(q k^T / sqrt(d)) v for each head, with q, k, v packed in x.

    With s = scale q k^T, p = softmax(s) over the keys and y = p v, the chain rule gives

        dE/dv = p^T ct
        dE/dp = ct v^T
        dE/ds = p (dE/dp - sum over keys of p dE/dp)       softmax's Jacobian, diag(p) - p p^T
              = p (dE/dp - <ct, y>)                        as sum_k p_k <ct, v_k> = <ct, y>
        dE/dq = scale dE/ds k
        dE/dk = scale dE/ds^T q

    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; the form with <ct, y> is that of Dao et
    al. 2022, https://arxiv.org/abs/2205.14135).

    x is (N, T, 3D), floating: the D features of q, then of k, then of v, each with its heads one
    after the other. y is (N, T, D); scale is 1 / sqrt(D / heads). ``causal``: position t looks at
    the positions up to t. The softmax is computed in at least float32.

    There is nothing to train: params are ``()``, or a padding mask, bool (N, T), True where the
    position is real. Keys that are padding get no weight, and where no key is left y and all
    cotangents are 0. d_params is always ``()``.

    Raises ``ValueError`` for another mask and for x that is not (N, T, 3D) with heads dividing D,
    ``TypeError`` for x not floating.
    """

    heads: int
    causal: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.heads, bool) or not isinstance(self.heads, Integral):
            raise TypeError(f"Attention takes a whole number of heads, not {self.heads!r}")
        if self.heads < 1:
            raise ValueError(f"Attention takes at least 1 head, not {self.heads}")
        if not isinstance(self.causal, bool):
            raise TypeError(f"Attention: causal is True or False, not {self.causal!r}")

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[()]:
        if getattr(x, "ndim", None) != 3 or not x.shape[2] or x.shape[2] % (3 * self.heads):
            raise ValueError(
                f"{self} takes x of shape (N, T, 3D), q, k and v packed, with {self.heads} heads "
                f"dividing D, not {shapes(x)}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self} takes floating x, not {x.dtype}")
        return ()

    def given(self, params: Any, *, key: Any = None, mask: Any = None) -> Any:
        """The padding mask in the place of the params."""
        return params if mask is None else mask

    def check_params(self, params: Any, x: Any) -> None:
        super().check_params((), x)
        if type(params) is tuple and not params:
            return
        if getattr(params, "shape", None) != x.shape[:2] or params.dtype != bool:
            raise ValueError(
                f"{self}: params are {shapes(params)}, but an input {shapes(x)} takes () or a "
                f"padding mask bool{list(x.shape[:2])}, True where the position is real"
            )

    def forward(
        self, params: Any, x: Float[Array, "n t c"]
    ) -> tuple[Float[Array, "n t d"], tuple[Array, Array, Array]]:
        q, k, v = self._split(x)
        s = _product("nqhd,nkhd->nhqk", q, k) * q.shape[-1] ** -0.5
        seen = self._seen(params, x.shape[1])
        if seen is not None:
            s = jnp.where(seen, s, jnp.finfo(s.dtype).min)
        p = jax.nn.softmax(s)
        if not isinstance(params, tuple):  # a row may have no key left
            p = jnp.where(seen, p, 0)
        p = p.astype(x.dtype)
        y = _product("nhqk,nkhd->nqhd", p, v).astype(x.dtype)
        y = y.reshape(*x.shape[:2], -1)
        return y, (x, p, y)

    def backward(
        self, params: Any, residuals: tuple[Array, Array, Array], ct: Float[Array, "n t d"]
    ) -> tuple[tuple[()], Float[Array, "n t c"]]:
        x, p, y = residuals
        q, k, v = self._split(x)
        ct, y = (z.reshape(q.shape) for z in (ct, y))
        d_v = _product("nhqk,nqhd->nkhd", p, ct)
        d_p = _product("nqhd,nkhd->nhqk", ct, v)
        mean = _product("nqhd,nqhd->nhq", ct, y)
        d_s = (p.astype(d_p.dtype) * (d_p - mean[..., None]) * q.shape[-1] ** -0.5).astype(x.dtype)
        d_q = _product("nhqk,nkhd->nqhd", d_s, k)
        d_k = _product("nhqk,nqhd->nkhd", d_s, q)
        return (), jnp.stack([d_q, d_k, d_v], axis=2).astype(x.dtype).reshape(x.shape)

    def _split(self, x: Float[Array, "n t c"]) -> tuple[Array, Array, Array]:
        """q, k and v, each (N, T, heads, d)."""
        n, t, c = x.shape
        q, k, v = jnp.moveaxis(x.reshape(n, t, 3, self.heads, c // (3 * self.heads)), 2, 0)
        return q, k, v

    def _seen(self, mask: Any, t: int) -> Bool[Array, "..."] | None:
        """Which keys each query looks at, to be broadcast to (N, heads, T, T); None: all."""
        causal = jnp.tri(t, dtype=bool) if self.causal else None
        if isinstance(mask, tuple):
            return causal
        mask = mask[:, None, None, :]
        return mask if causal is None else mask & causal


def _product(spec: str, a: Array, b: Array) -> Array:
    """einsum in at least float32."""
    wide = jnp.float32 if a.dtype.itemsize < 4 else a.dtype
    return jnp.einsum(spec, a, b, preferred_element_type=wide)
