"""Networks of the literature on images (N, H, W, C): x to logits (N, classes)."""

from __future__ import annotations

from jaxprop.combinators.chain import Chain, chain
from jaxprop.core.layer import Layer
from jaxprop.layers import Conv, Dense, Flatten, GlobalAvgPool, MaxPool, Relu


def three_c3d(classes: int = 10) -> Chain:
    """3C3D, for 32 x 32 images: three convolutions, three dense layers.

    As in DeepOBS (Schneider et al. 2019, https://arxiv.org/abs/1903.05499), whose test problem
    ``cifar10_3c3d`` BackPACK is measured on.
    """
    return chain(
        *(Conv(64, (5, 5), padding="VALID"), Relu(), MaxPool((3, 3), 2, "SAME")),
        *(Conv(96, (3, 3), padding="VALID"), Relu(), MaxPool((3, 3), 2, "SAME")),
        *(Conv(128, (3, 3)), Relu(), MaxPool((3, 3), 2, "SAME")),
        *(Flatten(), Dense(512), Relu(), Dense(256), Relu(), Dense(classes)),
    )


def all_cnn_c(classes: int = 100) -> Chain:
    """All-CNN-C, for 32 x 32 images: strided convolutions in the place of pooling, no dense layer.

    Springenberg et al. 2015, https://arxiv.org/abs/1412.6806, table 1 and section 3.2.1; without
    its dropout.
    """
    layers: list[Layer] = []
    for features, window, strides, padding in (
        (96, 3, 1, "SAME"),
        (96, 3, 1, "SAME"),
        (96, 3, 2, "SAME"),
        (192, 3, 1, "SAME"),
        (192, 3, 1, "SAME"),
        (192, 3, 2, "SAME"),
        (192, 3, 1, "VALID"),
        (192, 1, 1, "SAME"),
        (classes, 1, 1, "SAME"),
    ):
        layers += [Conv(features, (window, window), strides, padding), Relu()]
    return chain(*layers, GlobalAvgPool())
