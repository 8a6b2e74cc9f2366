"""Recurrent layers: one step along the sequence, and backpropagation through time as a scan.

The three share a plan. What the inputs contribute, x w + b, is one matmul over all positions before
the scan; only h u stays inside. On the way back the reverse scan carries the cotangent of the state
and leaves that of every step's pre-activation, d_z. Its sums over time are no part of the scan: w,
u and b have the cotangents sum_t x_t (outer) d_z_t, sum_t h_(t-1) (outer) d_z_t and sum_t d_z_t,
which are the forms that ``Dense`` has along a sequence (Werbos 1990, https://doi.org/10.1109/5.58337).

States start as zeros. In narrow dtypes what a scan carries and sums is kept in float32.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.factored import Outer, Sum
from jaxprop.layer import Layer, shapes

X = Float[Array, "n t i"]
Y = Float[Array, "n t f"]


class Recurrent(NamedTuple):
    """Params w (I, GF), u (F, GF) and b (GF,) of G gates side by side; b_u (F,) in a Gru only."""

    w: Any
    u: Any
    b: Any
    b_u: Any = None


class Recurrence(Layer):
    """x (N, T, I) -> all hidden states (N, T, features), with ``gates`` blocks in w, u and b.

    w starts as LeCun normal, each gate's block of u orthogonal, b as zeros.
    """

    features: int
    gates: ClassVar[int]

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.features, bool) or not isinstance(self.features, Integral):
            raise TypeError(f"{name} takes a whole number of features, not {self.features!r}")
        if self.features < 1:
            raise ValueError(f"{name} takes at least 1 feature, not {self.features}")

    def init(self, key: chex.PRNGKey, x: Any) -> Recurrent:
        if not hasattr(x, "ndim"):
            raise TypeError(f"{self} takes an array x, not {shapes(x)}")
        if x.ndim != 3:
            raise ValueError(
                f"{self} takes x of shape (N, T, I), axis 0 the example and axis 1 time, "
                f"not {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self} takes floating x, not {x.dtype}")
        if not x.shape[1] or not x.shape[2]:
            raise ValueError(f"{self} takes x of at least one step and one feature, not {x.shape}")
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        wide = _wider(dtype)
        for_w, *for_u = jax.random.split(key, 1 + self.gates)
        width = self.gates * self.features
        w = jax.nn.initializers.lecun_normal()(for_w, (x.shape[2], width), dtype)
        square = (self.features, self.features)
        orthogonal = jax.nn.initializers.orthogonal()
        u = jnp.concatenate([orthogonal(key, square, wide) for key in for_u], axis=1)
        return Recurrent(w, u.astype(dtype), jnp.zeros(width, dtype))


class Rnn(Recurrence):
    """h_t = tanh(z_t), z_t = x_t w + h_(t-1) u + b: the simple recurrent network.

    h_t reaches the loss as the output y_t and through z_(t+1), so its cotangent is

        d_h_t = ct_t + d_z_(t+1) u^T,        d_z_t = d_h_t (1 - h_t^2),

    from the last step to the first. Only y is saved: it holds every h, and tanh' is written in it
    (Elman 1990, https://doi.org/10.1207/s15516709cog1402_1).

    x is (N, T, I), floating; y is (N, T, features). Raises ``ValueError`` and ``TypeError`` for an
    x that is not.
    """

    gates: ClassVar[int] = 1

    def forward(self, params: Recurrent, x: X) -> tuple[Y, tuple[X, Y]]:
        def step(h: Array, z: Array) -> tuple[Array, Array]:
            h = jnp.tanh(_wide(z) + _dot(h, params.u)).astype(x.dtype)
            return h, h

        z = _from_inputs(params, x)
        _, h = jax.lax.scan(step, jnp.zeros_like(z[0]), z)
        y = _swap(h)
        return y, (x, y)

    def backward(self, params: Recurrent, residuals: Any, ct: Y) -> tuple[Recurrent, X]:
        x, y = residuals
        _check(self, y, ct)

        def step(d_z: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            h, ct = map(_wide, at)
            d_h = ct + _dot(d_z, params.u.T)
            d_z = (d_h * ((1 + h) * (1 - h))).astype(x.dtype)
            return d_z, d_z

        h = _swap(y)
        _, d_z = jax.lax.scan(step, jnp.zeros_like(h[0]), (h, _swap(ct)), reverse=True)
        d_z = _swap(d_z)
        d_params = Recurrent(Outer(x, d_z), Outer(_before(y), d_z), Sum(d_z))
        return d_params, (d_z @ params.w.T).astype(x.dtype)


class Lstm(Recurrence):
    """h_t = o_t tanh(c_t), c_t = f_t c_(t-1) + i_t g_t: long short-term memory.

    The gates come from z_t = x_t w + h_(t-1) u + b, cut in four: i, f and o are the sigmoids of
    theirs, g the tanh of its own. With d_h_t = ct_t + d_z_(t+1) u^T as in ``Rnn``, c_t reaches the
    loss through h_t and through c_(t+1), so

        d_c_t = d_h_t o_t (1 - tanh^2 c_t) + d_c_(t+1) f_(t+1)

    and each gate's share of d_z_t is its factor's cotangent times its own derivative:

        d_i = d_c_t g_t i_t (1 - i_t)              d_f = d_c_t c_(t-1) f_t (1 - f_t)
        d_g = d_c_t i_t (1 - g_t^2)                d_o = d_h_t tanh(c_t) o_t (1 - o_t).

    The four gates and c are saved; tanh(c_t) is taken again. The forget gate's bias starts at 1
    (Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; with f: Gers,
    Schmidhuber and Cummins 2000, https://doi.org/10.1162/089976600300015015).

    x is (N, T, I), floating; y is (N, T, features). Raises ``ValueError`` and ``TypeError`` for an
    x that is not.
    """

    gates: ClassVar[int] = 4

    def init(self, key: chex.PRNGKey, x: Any) -> Recurrent:
        params = super().init(key, x)
        return params._replace(b=params.b.at[self.features : 2 * self.features].set(1))

    def forward(self, params: Recurrent, x: X) -> tuple[Y, Any]:
        def step(carry: tuple[Array, Array], z: Array) -> tuple[Any, Any]:
            h, c = carry
            i, f, g, o = jnp.split(_wide(z) + _dot(h, params.u), 4, axis=-1)
            i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
            c = f * c + i * g
            h = (o * jnp.tanh(c)).astype(x.dtype)
            gates = jnp.concatenate([i, f, g, o], axis=-1).astype(x.dtype)
            return (h, c), (h, gates, c.astype(x.dtype))

        z = _from_inputs(params, x)
        h = jnp.zeros_like(z[0, :, : self.features])
        _, (h, gates, c) = jax.lax.scan(step, (h, _wide(h)), z)
        y = _swap(h)
        return y, (x, y, _swap(gates), _swap(c))

    def backward(self, params: Recurrent, residuals: Any, ct: Y) -> tuple[Recurrent, X]:
        x, y, gates, c = residuals
        _check(self, y, ct)

        def step(carry: tuple[Array, Array], at: Any) -> tuple[Any, Array]:
            d_h, d_c = carry
            gates, c, c_before, ct = map(_wide, at)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            t = jnp.tanh(c)
            d_h = ct + d_h
            d_c = d_c + d_h * o * ((1 + t) * (1 - t))
            d_z = jnp.concatenate(
                [
                    d_c * g * (i * (1 - i)),
                    d_c * c_before * (f * (1 - f)),
                    d_c * i * ((1 + g) * (1 - g)),
                    d_h * t * (o * (1 - o)),
                ],
                axis=-1,
            ).astype(x.dtype)
            return (_dot(d_z, params.u.T), d_c * f), d_z

        at = tuple(map(_swap, (gates, c, _before(c), ct)))
        zero = _wide(jnp.zeros_like(at[1][0]))
        _, d_z = jax.lax.scan(step, (zero, zero), at, reverse=True)
        d_z = _swap(d_z)
        d_params = Recurrent(Outer(x, d_z), Outer(_before(y), d_z), Sum(d_z))
        return d_params, (d_z @ params.w.T).astype(x.dtype)


class Gru(Recurrence):
    """h_t = (1 - z_t) n_t + z_t h_(t-1): the gated recurrent unit.

    With a_t = x_t w + b and s_t = h_(t-1) u, each cut in three,

        r_t = sigmoid(a_r + s_r),  z_t = sigmoid(a_z + s_z),  n_t = tanh(a_n + r_t q_t),

    where q_t = s_n + b_u: the reset gate scales the recurrent product, not the state, as in cuDNN
    and PyTorch. (A recurrent bias of the other two gates would only repeat theirs in b.)
    From d_h_t = ct_t + d_h_(t+1) z_(t+1) + d_s_(t+1) u^T follow

        d_a_z = d_h_t (h_(t-1) - n_t) z_t (1 - z_t)       d_a_n = d_h_t (1 - z_t) (1 - n_t^2)
        d_a_r = d_a_n q_t r_t (1 - r_t)                   d_s   = (d_a_r, d_a_z, d_a_n r_t),

    so x meets d_a, and h_(t-1) meets d_s. The three gates and q are saved (Cho et al. 2014,
    https://arxiv.org/abs/1406.1078).

    x is (N, T, I), floating; y is (N, T, features). Raises ``ValueError`` and ``TypeError`` for an
    x that is not.
    """

    gates: ClassVar[int] = 3

    def init(self, key: chex.PRNGKey, x: Any) -> Recurrent:
        params = super().init(key, x)
        return params._replace(b_u=jnp.zeros(self.features, params.b.dtype))

    def forward(self, params: Recurrent, x: X) -> tuple[Y, Any]:
        def step(h: Array, a: Array) -> tuple[Array, Any]:
            a_r, a_z, a_n = jnp.split(_wide(a), 3, axis=-1)
            s_r, s_z, s_n = jnp.split(_dot(h, params.u), 3, axis=-1)
            r, z, q = jax.nn.sigmoid(a_r + s_r), jax.nn.sigmoid(a_z + s_z), s_n + _wide(params.b_u)
            n = jnp.tanh(a_n + r * q)
            h = ((1 - z) * n + z * _wide(h)).astype(x.dtype)
            return h, (h, jnp.concatenate([r, z, n, q], axis=-1).astype(x.dtype))

        a = _from_inputs(params, x)
        _, (h, gates) = jax.lax.scan(step, jnp.zeros_like(a[0, :, : self.features]), a)
        y = _swap(h)
        return y, (x, y, _swap(gates))

    def backward(self, params: Recurrent, residuals: Any, ct: Y) -> tuple[Recurrent, X]:
        x, y, gates = residuals
        _check(self, y, ct)

        def step(d_h: Array, at: Any) -> tuple[Array, Array]:
            gates, h_before, ct = map(_wide, at)
            r, z, n, q = jnp.split(gates, 4, axis=-1)
            d_h = ct + d_h
            d_n = d_h * (1 - z) * ((1 + n) * (1 - n))
            d_z = d_h * (h_before - n) * (z * (1 - z))
            d_r = d_n * q * (r * (1 - r))
            d_a = jnp.concatenate([d_r, d_z, d_n], axis=-1)
            d_s = jnp.concatenate([d_r, d_z, d_n * r], axis=-1)
            return d_h * z + _dot(d_s.astype(x.dtype), params.u.T), d_a.astype(x.dtype)

        h_before = _before(y)
        at = tuple(map(_swap, (gates, h_before, ct)))
        _, d_a = jax.lax.scan(step, _wide(jnp.zeros_like(at[1][0])), at, reverse=True)
        d_a, cut = _swap(d_a), 2 * self.features
        d_q = d_a[..., cut:] * gates[..., : self.features]
        d_s = jnp.concatenate([d_a[..., :cut], d_q], axis=-1)
        d_params = Recurrent(Outer(x, d_a), Outer(h_before, d_s), Sum(d_a), Sum(d_q))
        return d_params, (d_a @ params.w.T).astype(x.dtype)


def _from_inputs(params: Recurrent, x: X) -> Float[Array, "t n g"]:
    """x w + b for all steps at once, time first."""
    return _swap(x) @ params.w + params.b


def _before(states: Y) -> Y:
    """Each step's state before it: one step later, behind the zeros that a sequence starts from."""
    return jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0)))


def _swap(x: Float[Array, "a b c"]) -> Float[Array, "b a c"]:
    """Between example first, as arrays are handed on, and time first, as a scan takes them."""
    return jnp.swapaxes(x, 0, 1)


def _dot(x: Float[Array, "n k"], u: Float[Array, "k m"]) -> Float[Array, "n m"]:
    return jnp.matmul(x, u, preferred_element_type=_wider(x.dtype))


def _wide(x: Array) -> Array:
    return x.astype(_wider(x.dtype))


def _wider(dtype: Any) -> Any:
    return jnp.float32 if dtype.itemsize < 4 else dtype


def _check(layer: Layer, y: Y, ct: Y) -> None:
    if ct.shape != y.shape:
        raise ValueError(f"{layer}: ct has shape {ct.shape}, but y has {y.shape}")
