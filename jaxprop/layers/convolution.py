"""Convolution over positions."""

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
from jaxprop.layers.padding import MODES, WORDS, Padding, Sizes, check_room, extended, folded_back
from jaxprop.layers.patches import Patches
from jaxprop.layers.windows import AXES, Windows, sizes


class Conv(Layer):
    """A convolution, y[t] = sum_k x[t s + k d] w[k] + b over the taps k of the window.

    s is the stride and d the dilation; t, k, s and d have an entry for each spatial axis.
    (Strictly, this is a cross-correlation.) Each tap is a dense layer, which adds x[n, t s + k d]
    times the matrix w[k] to y[n, t]. Dense layers that share their output add up, so

        dE/dw[k]    = sum_n sum_t x[n, t s + k d] (outer) ct[n, t]        ``Patches``
        dE/db       = sum_n sum_t ct[n, t]
        dE/dx[n, h] = sum of ct[n, t] w[k]^T over all t and k with t s + k d = h.

    dE/dx is again a convolution: of ct, with input dilation s, with the flipped window and w's two
    channel axes swapped (Dumoulin and Visin 2016, https://arxiv.org/abs/1603.07285). For x with few
    channels, a CPU is faster with the sum as written: one matmul for all taps, then each tap's part
    added where that tap read x. With "CIRCULAR" and "REFLECT", all this holds for x padded with its
    own entries, and the cotangent of a repeated entry is added to that of its original.

    x is (N, *spatial, C), floating, with one to three spatial axes, as many as ``window`` has. y is
    (N, *outputs, features). w is (*window, C / groups, features) and starts as LeCun normal, b is
    (features,) and starts as zeros. Shapes, initial params and the default "SAME" are as in Flax;
    PyTorch adds no padding by default, has the channels first, and starts w and b as uniform.

    Args:
        features: the number of channels of y.
        window: the size of the window along each spatial axis.
        strides: s, one number for all axes or a tuple; None for 1.
        padding: "SAME", "VALID", or how many zeros to add: a whole number for all ends, or a
            (low, high) pair for each axis. "CAUSAL", for x (N, T, C), adds all zeros before the
            first step, so that y[t] reads no later step. "CIRCULAR" and "REFLECT" pad x with its
            own entries, as in Flax; with strides of 1, y has the size of x.
        dilation: d, one number for all axes or a tuple; None for 1.
        groups: the number of parallel convolutions among which the channels of x and y are split.
        bias: whether to add b.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, for x that has another rank, is smaller than the
            window or is too small to be repeated, and for channels or features that ``groups`` does
            not divide.
    """

    features: int
    window: Sizes = (3, 3)
    strides: int | Sizes | None = None
    padding: Padding = "SAME"
    dilation: int | Sizes | None = None
    groups: int = 1
    bias: bool = True
    mixes_positions = True

    def __post_init__(self) -> None:
        check_fields(self, WORDS)

    def init(self, key: Array, x: PyTree) -> AffineParams:
        check_x(self, x, AXES[len(self.window)])
        windows = self._windows(x)
        if mode := MODES.get(self.padding):
            check_room(self, x.shape, windows.padding, mode)
        return init_affine(self, key, x, windows)

    def forward(self, params: AffineParams, x: X) -> tuple[Y, X]:
        return convolve(params, *self._padded(x), self.groups), x

    def backward(self, params: AffineParams, x: X, ct: Y) -> tuple[AffineParams, X]:
        check_ct(self, x, ct, self._windows(x))
        padded, windows = self._padded(x)
        d_b = None if params.b is None else Sum(ct)
        d_x = pulled_back(params.w, ct, windows, self.groups, padded.shape[1:-1])
        if mode := MODES.get(self.padding):
            d_x = folded_back(d_x, self._windows(x).padding, mode)
        padded, ct = promoted(padded, ct)
        d_w = Patches(padded, ct, windows, self.groups)
        return AffineParams(d_w, d_b), d_x.astype(x.dtype)

    def _padded(self, x: X) -> tuple[X, Windows]:
        """Return x, padded with its own entries if the mode says so, and the windows over it."""
        windows = self._windows(x)
        mode = MODES.get(self.padding)
        if mode is None:
            return x, windows
        none = ((0, 0),) * len(self.window)
        return extended(x, windows.padding, mode), windows._replace(padding=none)

    def _windows(self, x: PyTree) -> Windows:
        rank = len(self.window)
        strides = sizes("Conv: strides", self.strides, rank)
        dilation = sizes("Conv: dilation", self.dilation, rank)
        return Windows.over(x.shape[1:-1], self.window, strides, self.padding, dilation)
