"""The recurrent network that is measured."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprop.combinators import chain
from jaxprop.layer import Layer
from jaxprop.layers import Dense, Lstm
from jaxprop.losses import CrossEntropy, Loss


def lstm(batch: int, length: int, features: int) -> tuple[Layer, Loss, tuple[Any, Any, Any]]:
    """An LSTM and ten classes at every step: ``(net, loss, (params, x, target))``."""
    net, keys = chain(Lstm(features), Dense(10)), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, length, features), jnp.float32)
    target = jax.random.randint(keys[1], (batch, length), 0, 10)
    return net, CrossEntropy(), (net.init(keys[2], x), x, target)
