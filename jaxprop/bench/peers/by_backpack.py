"""Quantities of the backward pass, by BackPACK."""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from backpack import backpack, extend, extensions
from jax import Array
from torch import Tensor, nn

from jaxprop.bench.networks import Network
from jaxprop.bench.peers import in_torch, ours
from jaxprop.bench.peers.in_torch import InTorch
from jaxprop.bench.peers.pair import Pair, Side, jitted
from jaxprop.core.types import PyTree
from jaxprop.quantity.functions import (
    diag_ggn,
    kronecker_factors,
    per_example_grads,
    second_moment,
    variance,
)


class Asked(NamedTuple):
    """A quantity that both sides compute.

    Attributes:
        extension: makes BackPACK's extension.
        field: the attribute of a param in which BackPACK stores the result.
        make: makes our function.
        times: a function of the number of examples, by which their result is multiplied, since
            their loss is a mean.
        draws: whether it draws samples; then only what does not depend on them is compared.
    """

    extension: Callable[[], Any]
    field: str
    make: Callable[..., Any]
    times: Callable[[int], float] = lambda n: 1.0
    draws: bool = False


ASKED: dict[str, Asked] = {
    "second-moment": Asked(
        extensions.SumGradSquared, "sum_grad_squared", second_moment, lambda n: n
    ),
    "variance": Asked(extensions.Variance, "variance", variance, lambda n: n**2),
    "diag-ggn": Asked(extensions.DiagGGNExact, "diag_ggn_exact", diag_ggn),
    "diag-ggn-mc": Asked(extensions.DiagGGNMC, "diag_ggn_mc", diag_ggn, draws=True),
    "kflr": Asked(extensions.KFLR, "kflr", kronecker_factors),
    "kfac": Asked(extensions.KFAC, "kfac", kronecker_factors, draws=True),
    "grads": Asked(extensions.BatchGrad, "grad_batch", per_example_grads, lambda n: n),
}
"""The quantities for dense layers."""


def norms(network: Network, peer: InTorch) -> Pair:
    """Return the pair for the per-example squared norms."""
    net, extension = extend(peer.net), extensions.BatchL2Grad()

    def run() -> None:
        net.zero_grad()
        with backpack(extension):
            in_torch.loss(net(peer.x), peer.target).backward()

    def numbers() -> Tensor:
        run()
        each = [param.batch_l2 for param in in_torch.learned(net)]  # pyright: ignore
        return sum(each) * len(peer.x) ** 2

    return Pair(jitted(ours.norms(network), *network[2]), Side(run, numbers))


def quantity(network: Network, peer: InTorch, name: str) -> Pair:
    """Return the pair for one of the other quantities, on dense layers.

    Args:
        network: ours.
        peer: theirs.
        name: a name in ``ASKED``.
    """
    asked, (ours_net, ours_loss, args) = ASKED[name], network
    net, loss = extend(peer.net), extend(nn.CrossEntropyLoss())
    extension = asked.extension()

    def run() -> None:
        net.zero_grad()
        with backpack(extension):
            loss(net(peer.x), peer.target).backward()

    def numbers() -> PyTree:
        run()
        found = [getattr(param, asked.field) for param in in_torch.learned(net)]
        if asked.draws:
            return [each[1] for each in found if isinstance(each, list) and len(each) > 1]
        return jax.tree.map(lambda each: each * asked.times(len(peer.x)), found)

    take = asked.make(ours_net, ours_loss)
    if asked.draws:
        drawn = functools.partial(_with_key, take)
        return Pair(jitted(drawn, *args, jax.random.key(0), convert=_inputs), Side(run, numbers))
    convert = _factors if name == "kflr" else _transposed
    return Pair(jitted(take, *args, convert=convert), Side(run, numbers))


def _with_key(take: Callable[..., PyTree], *args: PyTree) -> PyTree:
    *given, key = args
    return take(*given, key=key)


def _transposed(params: PyTree) -> list[Array]:
    """Return arrays of params, with weights (..., I, O) transposed to (..., O, I)."""
    return [a for w, b in ours.layers(params) for a in (jnp.swapaxes(w, -1, -2), b)]


def _factors(params: PyTree) -> list[list[Array]]:
    layers: list[Any] = ours.layers(params)
    return [each for w, b in layers for each in ([w.b, w.a], [b.b])]


def _inputs(params: PyTree) -> list[Array]:
    """Return what does not depend on the draws: the inputs' factors, or nothing for a diagonal."""
    layers: list[Any] = ours.layers(params)
    return [w.a for w, _ in layers if hasattr(w, "a")]
