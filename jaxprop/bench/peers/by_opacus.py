"""Per-example norms and clipping by Opacus."""

# pyright: reportMissingImports=false
from __future__ import annotations

import warnings
from typing import Any

import torch
from jax import Array
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from jaxprop.bench.networks import Network
from jaxprop.bench.peers import in_torch, ours, torch_models
from jaxprop.bench.peers.in_torch import InTorch
from jaxprop.bench.peers.pair import Pair, Side, jitted
from jaxprop.core.types import PyTree


def peer(name: str, network: Network) -> InTorch:
    """Return one of the networks for Opacus, which has its own LSTM.

    Args:
        name: a name in ``ours.FULL``.
        network: ours, of any size.
    """
    there = in_torch.peer(name, network)
    if name != "lstm":
        return there
    cell, head = params = network[2][0]
    lstm = DPLSTM(cell.w.shape[0], cell.u.shape[0], batch_first=True)
    net = torch_models.Lstm(lstm, "l0.hh.bias", nn.Linear(*head.w.shape))

    def arrays(params: PyTree) -> list[Array]:
        w, u, b, *of_head = torch_models.of_lstm(params)
        return [w, b, u, *of_head]

    in_torch.set_params(net, arrays(params))
    return there._replace(net=net, arrays=arrays)


def norms(network: Network, peer: InTorch, tied: bool = False) -> Pair:
    """Return the pair for the per-example squared norms; theirs computes no clipped gradient.

    Args:
        network: ours.
        peer: theirs.
        tied: whether a param is used twice, so that Opacus has to compute each example's gradient.
    """
    net = _watched(peer, tied)

    def run() -> Tensor:
        net.zero_grad()
        in_torch.loss(net(peer.x), peer.target).backward()
        if not tied:
            return net.get_norm_sample() ** 2
        each = [param.grad_sample.flatten(1) for param in in_torch.learned(net)]  # pyright: ignore
        return sum((g.square().sum(1) for g in each), start=torch.zeros(()))

    return Pair(
        jitted(ours.norms(network), *network[2]),
        Side(run, lambda: run().numpy(force=True)),
    )


def clipped(network: Network, peer: InTorch, tied: bool = False) -> Pair:
    """Return the pair for the mean of the clipped gradients, theirs up to the optimizer's step.

    Args:
        network: ours.
        peer: theirs.
        tied: whether a param is used twice, so that Opacus has to compute each example's gradient.
    """
    max_norm = ours.bound(network)
    data = DataLoader(TensorDataset(peer.x, peer.target), batch_size=len(peer.x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, optimizer, *rest = PrivacyEngine().make_private(
            module=peer.net.train(),
            optimizer=torch.optim.SGD(in_torch.learned(peer.net), lr=0.0),
            criterion=nn.CrossEntropyLoss(),
            data_loader=data,
            noise_multiplier=0.0,
            max_grad_norm=max_norm,
            grad_sample_mode="hooks" if tied else "ghost",
            poisson_sampling=False,
        )

    def value() -> Any:
        y = net(peer.x)
        if tied:
            return in_torch.loss(y, peer.target)
        along = {"shape": y.shape} if y.ndim > 2 else {}  # an example is a sequence
        return rest[0](y.flatten(0, -2), peer.target.flatten(), **along)

    def run() -> Tensor:
        optimizer.zero_grad()
        found = value()
        found.backward()
        optimizer.pre_step()
        return found.detach()

    def numbers() -> PyTree:
        return {"value": run(), "grads": in_torch.grads_of(peer.net)}

    return Pair(
        jitted(ours.clipped(network, max_norm), *network[2], convert=peer.of_grads),
        Side(run, numbers),
    )


def _watched(peer: InTorch, tied: bool) -> Any:
    """Return the net in a module that computes each example's norm, or its gradient if tied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tied:
            return GradSampleModule(peer.net.train(), loss_reduction="mean")
        return GradSampleModuleFastGradientClipping(peer.net.train(), loss_reduction="mean")
