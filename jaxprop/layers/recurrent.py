"""Recurrent layers: a scan along the sequence, and backpropagation through time as a reverse scan.

All three are computed in the same way. The inputs' part of the pre-activations, x w, is one matmul
for all steps before the scan, and only h u is computed inside. ``forward`` saves each step's local
derivatives, its *slopes*, so that the reverse scan only multiplies and adds. That scan carries the
cotangent of the state, and writes the cotangent of each pre-activation over the slopes that it has
used.

The sums over time are not part of the scan. With z_t = x_t w + h_(t-1) u + b they are

    dE/dw = sum_t x_t (outer) d_z_t,    dE/du = sum_t h_(t-1) (outer) d_z_t,    dE/db = sum_t d_z_t

each of them one matmul or one sum, in the forms of ``Dense`` along a sequence (Werbos 1990,
https://doi.org/10.1109/5.58337).

The formulas are those for ``output="sequence"``, where y_t = h_t, from a state of zeros. The
reverse scan starts from the cotangent of the last state, and ends at the cotangent of the first
state, if one is given. At a step that a mask marks as padding the state does not change, so that
its cotangent passes unchanged, and d_z_t is 0. With ``reverse`` both scans run the other way.

For x of a narrow dtype, the scans carry and add in float32.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import wide
from jaxprop.core.forms import Sum
from jaxprop.core.types import Cotangent, PyTree
from jaxprop.layers.recurrence import Kept, Recurrence, RecurrentParams
from jaxprop.layers.through_time import dot, turned

Arrays = tuple[Array, ...]
State = tuple[Array]
States = tuple[Array, Array]


class Rnn(Recurrence):
    """The simple recurrent network, h_t = tanh(z_t) with z_t = x_t w + h_(t-1) u + b.

    h_t is the output y_t and enters z_(t+1), so from the last step to the first

        d_h_t = ct_t + d_z_(t+1) u^T,        d_z_t = d_h_t (1 - h_t^2).

    The slopes are a function of y, so nothing more is saved (Elman 1990,
    https://doi.org/10.1207/s15516709cog1402_1).

    x is (N, T, I), floating, and y is (N, T, F) with F = ``features``; x may be a pair (x, h) with
    the state to start from. params are ``RecurrentParams``: w (I, F) starts as LeCun normal, u
    (F, F) as orthogonal, b (F,) as zeros (PyTorch has two biases, which add up).

    A ``jp.Mask``, which ``net.bind(params, mask=)`` puts into the params, says which steps are
    real. At other steps the state does not change, and y is 0.

    Args:
        features: the size of the hidden state.
        reverse: whether to start from the last step; y[:, t] still belongs to x[:, t].
        output: what y is: "sequence", as above; "last", the h (N, F) after the last real step; or
            "both", the pair of the sequence and the last state.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for ``features`` below 1 or another ``output``, for x of another rank or with an
            empty axis, for a state that does not fit, and for a mask that is not (N, T).
    """

    gates: ClassVar[int] = 1

    def forward(self, params: RecurrentParams, x: PyTree) -> tuple[PyTree, Kept]:
        def step(carry: State, from_x: Array) -> tuple[State, tuple[()]]:
            (h,) = carry
            return (jnp.tanh(wide(from_x) + dot(h, params.u) + wide(params.b)[None]),), ()

        return self._along(step, params, x)

    def backward(
        self, params: RecurrentParams, residuals: Kept, ct: Cotangent
    ) -> tuple[RecurrentParams, PyTree]:
        h, u_t = residuals.h, turned(params.u)

        def step(carry: State, ct: Array, slope: Array) -> tuple[State, Array]:
            (pulled,) = carry
            d_z = (ct + pulled) * slope
            return (dot(d_z, u_t),), d_z

        d_start, d_z = self._through(step, params, residuals, ct, (1 + h) * (1 - h))
        return self._pulled(params, residuals, d_z, d_z, d_start)


class Lstm(Recurrence):
    """Long short-term memory, h_t = o_t tanh(c_t) with c_t = f_t c_(t-1) + i_t g_t.

    z_t = x_t w + h_(t-1) u + b is split into four parts. The gates i, f and o are the sigmoids of
    their parts, and g is the tanh of its part. c_t reaches the loss through h_t and c_(t+1), and
    h_t through y_t and z_(t+1):

        d_h_t = ct_t + d_z_(t+1) u^T,        d_c_t = d_c_(t+1) f_(t+1) + d_h_t o_t (1 - tanh^2 c_t)

    Each part of d_z_t is d_c_t (for o, d_h_t) times a slope that forward computes,

        of i: g_t i_t (1 - i_t)              of f: c_(t-1) f_t (1 - f_t)
        of g: i_t (1 - g_t^2)                of o: tanh(c_t) o_t (1 - o_t).

    The residuals are these four, f_t and o_t (1 - tanh^2 c_t), not the gates and c (Hochreiter and
    Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735, with the forget gate f of Gers,
    Schmidhuber and Cummins 2000, https://doi.org/10.1162/089976600300015015).

    x is (N, T, I), floating, and y is (N, T, F) with F = ``features``; x may be a pair (x, (h, c))
    with the state to start from. params are ``RecurrentParams``: w (I, 4F) starts as LeCun normal,
    u (F, 4F) as orthogonal for each gate, and b (4F,) as zeros, except for the part of f, which
    starts as ones so that a new cell remembers. The parts are in the order i, f, g, o, as in
    PyTorch, which has two biases, to be added up, and starts them at random. Flax starts all of b
    as zeros, and its carry is (c, h).

    A ``jp.Mask``, which ``net.bind(params, mask=)`` puts into the params, says which steps are
    real. At other steps the state does not change, and y is 0.

    Args:
        features: the size of the hidden state.
        reverse: whether to start from the last step; y[:, t] still belongs to x[:, t].
        output: what y is: "sequence", as above; "last", the h (N, F) after the last real step; or
            "both", the pair of the sequence and the last state.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for ``features`` below 1 or another ``output``, for x of another rank or with an
            empty axis, for a state that does not fit, and for a mask that is not (N, T).
    """

    gates: ClassVar[int] = 4
    states: ClassVar[int] = 2

    def init(self, key: Array, x: PyTree) -> RecurrentParams:
        params = super().init(key, x)
        return params._replace(b=params.b.at[self.features : 2 * self.features].set(1))

    def forward(self, params: RecurrentParams, x: PyTree) -> tuple[PyTree, Kept]:
        def step(carry: States, from_x: Array) -> tuple[States, Arrays]:
            h, c0 = carry
            z = wide(from_x) + dot(h, params.u) + wide(params.b)[None]
            i, f, g, o = jnp.split(z, 4, axis=-1)
            i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
            c = f * c0 + i * g
            t = jnp.tanh(c)
            h = o * t
            of_i, of_f = g * (i * (1 - i)), c0 * (f * (1 - f))
            of_g, of_o = i * ((1 + g) * (1 - g)), t * (o * (1 - o))
            slope = jnp.concatenate([of_i, of_f, of_g, of_o], axis=-1)
            return (h, c), (slope, f, o * ((1 + t) * (1 - t)))

        return self._along(step, params, x)

    def backward(
        self, params: RecurrentParams, residuals: Kept, ct: Cotangent
    ) -> tuple[RecurrentParams, PyTree]:
        (slope, f, of_c), u_t = residuals.slopes, turned(params.u)

        def step(
            carry: States, ct: Array, slope: Array, f: Array, of_c: Array
        ) -> tuple[States, Array]:
            pulled, d_c = carry
            d_h = ct + pulled
            d_c = d_c + d_h * of_c
            d_z = jnp.concatenate([d_c, d_c, d_c, d_h], axis=-1) * slope
            return (dot(d_z, u_t), d_c * f), d_z

        d_start, d_z = self._through(step, params, residuals, ct, slope, f, of_c)
        return self._pulled(params, residuals, d_z, d_z, d_start)


class Gru(Recurrence):
    """The gated recurrent unit, h_t = (1 - z_t) n_t + z_t h_(t-1).

    With a_t = x_t w + b and s_t = h_(t-1) u, each split into three parts r, z and n,

        r_t = sigmoid(a_r + s_r),   z_t = sigmoid(a_z + s_z),   n_t = tanh(a_n + r_t q_t),

    where q_t = s_n + b_u. The reset gate r scales the recurrent product, not the state, as in
    cuDNN, PyTorch and Flax. (A recurrent bias for the other gates would only repeat b.) The chain
    rule starts from d_h_t = ct_t + d_h_(t+1) z_(t+1) + d_s_(t+1) u^T, and each part of the
    cotangents of a and s is d_h_t times a slope that forward computes,

        of a_n: p_t = (1 - z_t) (1 - n_t^2)         of a_r: p_t q_t r_t (1 - r_t)
        of q:   p_t r_t                             of a_z: (h_(t-1) - n_t) z_t (1 - z_t).

    dE/dw is the product of x and d_a = (d_a_r, d_a_z, d_a_n), and dE/du that of h_(t-1) and
    d_s = (d_a_r, d_a_z, d_q). The residuals are the slopes and z_t (Cho et al. 2014,
    https://arxiv.org/abs/1406.1078).

    x is (N, T, I), floating, and y is (N, T, F) with F = ``features``; x may be a pair (x, h) with
    the state to start from. params are ``RecurrentParams``: w (I, 3F) starts as LeCun normal, u
    (F, 3F) as orthogonal for each gate, b (3F,) and b_u (F,) as zeros.

    A ``jp.Mask``, which ``net.bind(params, mask=)`` puts into the params, says which steps are
    real. At other steps the state does not change, and y is 0.

    Args:
        features: the size of the hidden state.
        reverse: whether to start from the last step; y[:, t] still belongs to x[:, t].
        output: what y is: "sequence", as above; "last", the h (N, F) after the last real step; or
            "both", the pair of the sequence and the last state.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for ``features`` below 1 or another ``output``, for x of another rank or with an
            empty axis, for a state that does not fit, and for a mask that is not (N, T).
    """

    gates: ClassVar[int] = 3

    def init(self, key: Array, x: PyTree) -> RecurrentParams:
        params = super().init(key, x)
        return params._replace(b_u=jnp.zeros(self.features, params.b.dtype))

    def forward(self, params: RecurrentParams, x: PyTree) -> tuple[PyTree, Kept]:
        def step(carry: State, from_x: Array) -> tuple[State, Arrays]:
            (h0,) = carry
            a_r, a_z, a_n = jnp.split(wide(from_x) + wide(params.b)[None], 3, axis=-1)
            s_r, s_z, s_n = jnp.split(dot(h0, params.u), 3, axis=-1)
            r, z = jax.nn.sigmoid(a_r + s_r), jax.nn.sigmoid(a_z + s_z)
            q = s_n + wide(params.b_u)[None]
            n = jnp.tanh(a_n + r * q)
            h = (1 - z) * n + z * h0
            p = (1 - z) * ((1 + n) * (1 - n))
            of_r, of_z = p * q * (r * (1 - r)), (h0 - n) * (z * (1 - z))
            slope = jnp.concatenate([of_r, of_z, p * r], axis=-1)
            return (h,), (slope, p, z)

        return self._along(step, params, x)

    def backward(
        self, params: RecurrentParams, residuals: Kept, ct: Cotangent
    ) -> tuple[RecurrentParams, PyTree]:
        (slope, p, z), u_t = residuals.slopes, turned(params.u)

        def step(
            carry: State, ct: Array, slopes: States, z: Array
        ) -> tuple[State, tuple[Array, Array]]:
            (pulled,), (slope, p) = carry, slopes
            d_h = ct + pulled
            d_s = jnp.concatenate([d_h, d_h, d_h], axis=-1) * slope
            return (d_h * z + dot(d_s, u_t),), (d_s, d_h * p)

        d_start, (d_s, d_n) = self._through(step, params, residuals, ct, (slope, p), z)
        d_rz, d_q = jnp.split(d_s, [2 * self.features], axis=-1)
        d_a = jnp.concatenate([d_rz, d_n], axis=-1)
        d_params, d_x = self._pulled(params, residuals, d_a, d_s, d_start)
        return d_params._replace(b_u=Sum(d_q)), d_x
