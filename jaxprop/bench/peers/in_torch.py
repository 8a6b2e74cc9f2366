"""The networks in PyTorch, eager, compiled, and with the channels last."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jax import Array
from torch import Tensor, nn
from torch.nn import functional

from jaxprop.bench.networks import Network
from jaxprop.bench.peers import ours
from jaxprop.bench.peers.pair import Absent, Pair, Side, jitted
from jaxprop.bench.peers.torch_models import MODELS
from jaxprop.core.types import Params, PyTree


class InTorch(NamedTuple):
    """A PyTorch network with our params, and its data.

    Attributes:
        net: the module.
        arrays: lists our params, or a gradient, as arrays in the order of the net's learned params.
        x: the input in its layout.
        target: the target.
    """

    net: nn.Module
    arrays: Callable[[Params], list[Array]]
    x: Tensor
    target: Tensor

    def of_grads(self, result: tuple[Array, Params]) -> PyTree:
        """Return our value and gradient in the structure that ``Side.numbers`` returns."""
        value, grads = result
        return {"value": value, "grads": self.arrays(grads)}


def peer(name: str, network: Network, last: bool = False) -> InTorch:
    """Return one of the networks in PyTorch, and let PyTorch use as many cores as XLA.

    Args:
        name: a name in ``ours.FULL``.
        network: ours, of any size.
        last: whether images lie in memory with the channels last.
    """
    torch.set_num_threads(cores())
    params, x, target = network[2]
    module, arrays = MODELS[name](params)
    given = torch.tensor(np.asarray(x))
    if name == "3c3d":
        given = given.permute(0, 3, 1, 2)
        layout = torch.channels_last if last else torch.contiguous_format
        given, module = given.contiguous(memory_format=layout), module.to(memory_format=layout)
    set_params(module, arrays(params))
    where = torch.tensor(np.asarray(target), dtype=torch.long)
    return InTorch(module, arrays, given, where)


def gradient(network: Network, peer: InTorch, compiled: bool = False) -> Pair:
    """Return the pair for the value and the gradient, theirs by ``backward``.

    Args:
        network: ours.
        peer: theirs.
        compiled: whether theirs is compiled by ``torch.compile``.

    Raises:
        Absent: if ``torch.compile`` fails.
    """

    def value() -> Tensor:
        return loss(peer.net(peer.x), peer.target)

    forward: Callable[[], Tensor] = torch.compile(value) if compiled else value

    def run() -> Tensor:
        peer.net.zero_grad()
        found = forward()
        found.backward()
        return found.detach()

    try:
        run()
    except Exception as error:
        if not compiled:
            raise
        raise Absent(f"torch.compile: {str(error).strip().splitlines()[0]}") from error

    def numbers() -> PyTree:
        return {"value": run(), "grads": grads_of(peer.net)}

    return Pair(
        jitted(ours.gradient(network), *network[2], convert=peer.of_grads), Side(run, numbers)
    )


def loss(y: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy over examples and their positions."""
    return functional.cross_entropy(y.flatten(0, -2), target.flatten(), reduction=reduction)


def of_each(y: Tensor, target: Tensor) -> Tensor:
    """Return each example's mean cross-entropy."""
    return loss(y, target, "none").view(len(target), -1).mean(1)


def learned(net: nn.Module) -> list[Tensor]:
    """Return the learned params, each once."""
    return [param for param in net.parameters() if param.requires_grad]


def set_params(net: nn.Module, arrays: list[Array]) -> None:
    """Replace the values of the learned params by those of arrays."""
    with torch.no_grad():
        for param, array in zip(learned(net), arrays, strict=True):
            param.copy_(torch.tensor(np.asarray(array)))


def grads_of(net: nn.Module) -> list[np.ndarray]:
    """Return the gradients of the learned params."""
    return [param.grad.numpy(force=True).copy() for param in learned(net) if param.grad is not None]


def cores() -> int:
    """Return how many cores this process may use, which is also XLA's number of threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
