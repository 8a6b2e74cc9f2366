"""Networks for images, from x (N, H, W, C) to logits (N, classes)."""

from __future__ import annotations

from jaxprop.combinators.chain import Chain, chain
from jaxprop.core.layer import Layer
from jaxprop.layers import Conv, Dense, Flatten, GlobalAvgPool, MaxPool, Relu
from jaxprop.layers.padding import Padding


def three_c3d(classes: int = 10) -> Chain:
    """Return 3C3D: three convolutions and three dense layers, for 32 x 32 images.

    This is the network of DeepOBS (Schneider et al. 2019, https://arxiv.org/abs/1903.05499). Its
    test problem ``cifar10_3c3d`` is the one that BackPACK is measured on.

    Args:
        classes: the number of logits.

    Returns:
        A net from x (N, 32, 32, C), floating, to logits (N, classes).
    """
    return chain(
        *(Conv(64, (5, 5), padding="VALID"), Relu(), MaxPool((3, 3), 2, "SAME")),
        *(Conv(96, (3, 3), padding="VALID"), Relu(), MaxPool((3, 3), 2, "SAME")),
        *(Conv(128, (3, 3)), Relu(), MaxPool((3, 3), 2, "SAME")),
        *(Flatten(), Dense(512), Relu(), Dense(256), Relu(), Dense(classes)),
    )


def all_cnn_c(classes: int = 100) -> Chain:
    """Return All-CNN-C, for 32 x 32 images: convolutions only, strided instead of pooled.

    This is the network of Springenberg et al. 2015, https://arxiv.org/abs/1412.6806, table 1 and
    section 3.2.1, without its dropout.

    Args:
        classes: the number of logits.

    Returns:
        A net from x (N, 32, 32, C), floating, to logits (N, classes).
    """
    rows: tuple[tuple[int, int, int, Padding], ...] = (
        (96, 3, 1, "SAME"),
        (96, 3, 1, "SAME"),
        (96, 3, 2, "SAME"),
        (192, 3, 1, "SAME"),
        (192, 3, 1, "SAME"),
        (192, 3, 2, "SAME"),
        (192, 3, 1, "VALID"),
        (192, 1, 1, "SAME"),
        (classes, 1, 1, "SAME"),
    )
    layers: list[Layer] = []
    for features, window, strides, padding in rows:
        layers += [Conv(features, (window, window), strides, padding), Relu()]
    return chain(*layers, GlobalAvgPool())
