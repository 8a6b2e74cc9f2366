"""The networks on images that are measured: each ``(net, loss, (params, x, target))``."""

from __future__ import annotations

from typing import Any

import jax

from jaxprop.layer import Layer
from jaxprop.losses import CrossEntropy, Loss
from jaxprop.models import images

Problem = tuple[Layer, Loss, tuple[Any, ...]]


def three_c3d(batch: int) -> Problem:
    """3C3D on random images of CIFAR-10's size."""
    return _on_random_images(images.three_c3d(), batch, classes=10)


def all_cnn_c(batch: int) -> Problem:
    """All-CNN-C on random images of CIFAR-100's size."""
    return _on_random_images(images.all_cnn_c(), batch, classes=100)


def _on_random_images(net: Layer, batch: int, classes: int) -> Problem:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, 32, 32, 3))
    target = jax.random.randint(keys[1], (batch,), 0, classes)
    return net, CrossEntropy(), (net.init(keys[2], x), x, target)
