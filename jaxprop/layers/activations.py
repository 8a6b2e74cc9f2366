"""Elementwise activations, each as ``jax.nn`` defines it.

The Jacobian of an elementwise y = f(x) is diagonal, so d_x = ct f'(x). A layer saves y where f' is
simplest in terms of y, which takes no more memory (y is the next layer's input), and x otherwise.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.checks import check_number, check_x
from jaxprop.core.layer import Layer

X = Float[Array, "n ..."]


class Elementwise(Layer):
    """An elementwise function, y_i = f(x_i), with x and y (N, ...), floating; no params.

    Given a cotangent of ones, ``backward`` returns f' itself, the local derivative.
    """

    def init(self, key: Array, x: X) -> tuple[()]:
        check_x(self, x, "N, ...")
        return ()


class Sigmoid(Elementwise):
    """The logistic sigmoid, y = 1 / (1 + exp(-x)).

    exp(-x) = (1 - y) / y, so f' = exp(-x) y^2 = y (1 - y).
    """

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        y = jax.nn.sigmoid(x)
        return y, y

    def backward(self, params: tuple[()], y: X, ct: X) -> tuple[tuple[()], X]:
        return (), ct * (y * (1 - y))


class Tanh(Elementwise):
    """The hyperbolic tangent, y = tanh(x).

    f' = 1 - y^2, written (1 + y) (1 - y), which cancels less near |y| = 1.
    """

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        y = jnp.tanh(x)
        return y, y

    def backward(self, params: tuple[()], y: X, ct: X) -> tuple[tuple[()], X]:
        return (), ct * ((1 + y) * (1 - y))


class Relu(Elementwise):
    """The rectified linear unit, y = max(x, 0).

    f' = 1 where y > 0, else 0; at x = 0 it is 0, as for ``jax.nn.relu``.
    """

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        y = jax.nn.relu(x)
        return y, y

    def backward(self, params: tuple[()], y: X, ct: X) -> tuple[tuple[()], X]:
        return (), jnp.where(y > 0, ct, 0)


class LeakyRelu(Elementwise):
    """The leaky rectified linear unit, y = x where x >= 0, else a x.

    f' = 1 or a; at x = 0 it is 1, as for ``jax.nn.leaky_relu``. The residual is only the sign of x,
    and not y: a x may be 0 where x is not.

    Args:
        negative_slope: a, a positive number. (With a = 0 the layer would be ``Relu``.)

    Raises:
        TypeError: for a slope that is not a number.
        ValueError: for a slope that is not positive.
    """

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        check_number("LeakyRelu: negative_slope", self.negative_slope, positive=True)

    def forward(self, params: tuple[()], x: X) -> tuple[X, Bool[Array, "n ..."]]:
        return jax.nn.leaky_relu(x, float(self.negative_slope)), x >= 0

    def backward(
        self, params: tuple[()], positive: Bool[Array, "n ..."], ct: X
    ) -> tuple[tuple[()], X]:
        return (), jnp.where(positive, ct, float(self.negative_slope) * ct)


class Elu(Elementwise):
    """The exponential linear unit, y = x where x > 0, else a (exp(x) - 1), so f' = 1 or a exp(x).

    Where x <= 0, f' is also y + a, but that cancels where exp(x) is small
    (Clevert et al. 2016, https://arxiv.org/abs/1511.07289).

    Args:
        alpha: a, a positive number.

    Raises:
        TypeError: for an alpha that is not a number.
        ValueError: for an alpha that is not positive.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number("Elu: alpha", self.alpha, positive=True)

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        return jax.nn.elu(x, float(self.alpha)), x

    def backward(self, params: tuple[()], x: X, ct: X) -> tuple[tuple[()], X]:
        below = jnp.minimum(x, 0)  # where x > 0, exp(x) may be infinite
        slope = float(self.alpha) * jnp.exp(below)
        return (), jnp.where(x > 0, ct, ct * slope)


class Gelu(Elementwise):
    """The Gaussian error linear unit, y = x P(Z <= x) for a standard normal Z.

    The default is its tanh approximation, as in JAX and Flax; PyTorch's is the exact form.

    Exact: y = x F(x) with F the normal distribution function and p its density, f' = F + x p.
    Approximate: y = x/2 (1 + t), t = tanh(u), u = c (x + a x^3), c = sqrt(2/pi), a = 0.044715, so
    f' = (1 + t)/2 + x/2 (1 + t)(1 - t) c (1 + 3 a x^2)
    (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415).

    Args:
        approximate: whether to take the tanh approximation instead of the exact form.

    Raises:
        TypeError: if ``approximate`` is not a bool.
    """

    approximate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.approximate, bool):
            raise TypeError(f"Gelu: approximate is True or False, not {self.approximate!r}")

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        return jax.nn.gelu(x, approximate=self.approximate), x

    def backward(self, params: tuple[()], x: X, ct: X) -> tuple[tuple[()], X]:
        x = jnp.clip(x, -30, 30)  # beyond, f' is 0 or 1, but x^3 may overflow: 0 times infinity
        if self.approximate:
            c, a = math.sqrt(2 / math.pi), 0.044715
            t = jnp.tanh(c * (x + a * x**3))
            slope = 0.5 * (1 + t) * (1 + x * (1 - t) * (c * (1 + 3 * a * x**2)))
        else:
            density = jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
            slope = 0.5 * jax.lax.erfc(-x / math.sqrt(2)) + x * density
        return (), ct * slope


class Silu(Elementwise):
    """The sigmoid linear unit, or swish, y = x s with s = sigmoid(x).

    s' = s (1 - s), so f' = s + x s (1 - s) = s (1 + x (1 - s))
    (Elfwing et al. 2018, https://arxiv.org/abs/1702.03118).
    """

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        return jax.nn.silu(x), x

    def backward(self, params: tuple[()], x: X, ct: X) -> tuple[tuple[()], X]:
        s = jax.nn.sigmoid(x)
        return (), ct * (s * (1 + x * (1 - s)))


class Softplus(Elementwise):
    """The softplus, y = log(1 + exp(x)), with f' = exp(x) / (1 + exp(x)) = sigmoid(x)."""

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        return jax.nn.softplus(x), x

    def backward(self, params: tuple[()], x: X, ct: X) -> tuple[tuple[()], X]:
        return (), ct * jax.nn.sigmoid(x)


class LogSigmoid(Elementwise):
    """The logarithm of the sigmoid, y = log(1 / (1 + exp(-x))) = -log(1 + exp(-x)).

    f' = sigmoid(-x) = 1 - exp(y). Like y, it is exact to rounding also where it is small.
    """

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        y = jax.nn.log_sigmoid(x)
        return y, y

    def backward(self, params: tuple[()], y: X, ct: X) -> tuple[tuple[()], X]:
        return (), ct * -jnp.expm1(y)
