"""The dense layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.affine import AffineParams
from jaxprop.core.arrays import aligned
from jaxprop.core.checks import check_counts, check_flags, check_x
from jaxprop.core.forms import Outer, Sum
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree


class Dense(Layer):
    """A dense layer, y = x w + b along the last axis.

    With y[n, j] = sum_i x[n, i] w[i, j] + b[j], the chain rule gives

        dE/dw[i, j] = sum_n ct[n, j] x[n, i]        a sum of outer products
        dE/db[j]    = sum_n ct[n, j]
        dE/dx[n, i] = sum_j ct[n, j] w[i, j]

    (Rumelhart, Hinton and Williams 1986, https://doi.org/10.1038/323533a0). Positions, the axes
    between the first and the last, are summed over like examples.

    x is (N, ..., I), floating; y is (N, ..., features). w is (I, features) and starts as LeCun
    normal, b is (features,) and starts as zeros, both as in Flax.
    (PyTorch starts both as uniform within 1 / sqrt(I) of 0, and has w transposed.)

    Args:
        features: the size of y's last axis.
        bias: whether to add b.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for ``features`` below 1, and for x without an example axis or features.
    """

    features: int
    bias: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "features")
        check_flags(self, "bias")

    def init(self, key: Array, x: PyTree) -> AffineParams:
        check_x(self, x, "N, ..., I")
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        w = jax.nn.initializers.lecun_normal()(key, (x.shape[-1], self.features), dtype)
        return AffineParams(w, jnp.zeros(self.features, dtype) if self.bias else None)

    def forward(
        self, params: AffineParams, x: Float[Array, "n ... i"]
    ) -> tuple[Float[Array, "n ... o"], Float[Array, "n ... i"]]:
        y = x @ params.w
        return (y if params.b is None else y + aligned(params.b, y)), x

    def backward(
        self, params: AffineParams, x: Float[Array, "n ... i"], ct: Float[Array, "n ... o"]
    ) -> tuple[AffineParams, Float[Array, "n ... i"]]:
        if ct.shape != (*x.shape[:-1], self.features):
            raise ValueError(f"{self}: ct has shape {ct.shape}, but x has {x.shape}")
        d_b = None if params.b is None else Sum(ct)
        return AffineParams(Outer(x, ct), d_b), (ct @ params.w.T).astype(x.dtype)
