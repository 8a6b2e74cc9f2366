"""Transposed convolution."""

from __future__ import annotations

from jax import Array

from jaxprop.core.affine import AffineParams
from jaxprop.core.arrays import promoted
from jaxprop.core.checks import check_x
from jaxprop.core.forms import Sum
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree
from jaxprop.layers.convolving import (
    X,
    Y,
    check_ct,
    check_fields,
    convolve,
    init_affine,
    pulled_back,
)
from jaxprop.layers.padding import Sizes, Zeros, whole_pairs
from jaxprop.layers.patches import Patches
from jaxprop.layers.windows import AXES, Windows, sizes


class ConvTranspose(Layer):
    """A transposed convolution, y[t] = sum_k x'[t + k d - low] w[k] + b over the taps k.

    x' is x with input dilation s: x'[h s] = x[h], and its other entries are 0. low is the padding
    before x'. This is ``Conv`` of x' with strides 1, and has its derivatives. d_x is needed only at
    multiples of s, where it is an ordinary convolution of ct with strides s. y is that of Flax, and
    of ``jax.lax.conv_transpose`` with ``transpose_kernel=False``: unlike in PyTorch, the window is
    not flipped, and w's channel axes are not swapped.

    x is (N, *spatial, C), floating, and y is (N, *outputs, features). w is
    (*window, C / groups, features) and starts as LeCun normal, b is (features,) and starts as
    zeros.

    Args:
        features: the number of channels of y.
        window: the size of the window along each spatial axis.
        strides: s, one number for all axes or a tuple; None for 1.
        padding: "SAME" for outputs of size spatial * strides; "VALID" for
            spatial * strides + max(reach - strides, 0), where the window spans
            reach = (window - 1) * dilation + 1 entries; or how many zeros to add to x', a whole
            number for all ends or a (low, high) pair for each axis. (PyTorch's padding is taken
            from y instead.)
        dilation: d, one number for all axes or a tuple; None for 1.
        groups: the number of parallel convolutions among which the channels of x and y are split.
        bias: whether to add b.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, for x of another rank or smaller than the window,
            and for channels or features that ``groups`` does not divide.
    """

    features: int
    window: Sizes = (3, 3)
    strides: int | Sizes | None = None
    padding: Zeros = "SAME"
    bias: bool = True
    dilation: int | Sizes | None = None
    groups: int = 1
    mixes_positions = True

    def __post_init__(self) -> None:
        check_fields(self)

    def init(self, key: Array, x: PyTree) -> AffineParams:
        check_x(self, x, AXES[len(self.window)])
        return init_affine(self, key, x, self._windows())

    def forward(self, params: AffineParams, x: X) -> tuple[Y, X]:
        return convolve(params, x, self._windows(), self.groups), x

    def backward(self, params: AffineParams, x: X, ct: Y) -> tuple[AffineParams, X]:
        windows = self._windows()
        check_ct(self, x, ct, windows)
        d_b = None if params.b is None else Sum(ct)
        d_x = pulled_back(params.w, ct, windows, self.groups, x.shape[1:-1]).astype(x.dtype)
        x, ct = promoted(x, ct)
        return AffineParams(Patches(x, ct, windows, self.groups), d_b), d_x

    def _windows(self) -> Windows:
        rank = len(self.window)
        ones = (1,) * rank
        strides = sizes("ConvTranspose: strides", self.strides, rank)
        dilation = sizes("ConvTranspose: dilation", self.dilation, rank)
        if isinstance(self.padding, str):
            axes = zip(self.window, dilation, strides, strict=True)
            padding = tuple(_transposed(self.padding, (k - 1) * d + 1, s) for k, d, s in axes)
        else:
            padding = whole_pairs(self.padding, rank)
        return Windows(self.window, ones, padding, dilation, strides)


def _transposed(padding: str, k: int, s: int) -> tuple[int, int]:
    """Return the padding of x' for a window that spans k entries."""
    if padding == "VALID":
        return k - 1, max(k, s) - 1
    total = k + s - 2
    low = k - 1 if s > k - 1 else -(-total // 2)
    return low, total - low
