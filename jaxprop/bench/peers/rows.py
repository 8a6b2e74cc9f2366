"""The rows of ``jaxprop bench --peers``, each a network, a task and a peer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxprop.bench.networks import Network
from jaxprop.bench.peers.ours import FULL
from jaxprop.bench.peers.pair import Absent, Pair


class Row(NamedTuple):
    """A row.

    Attributes:
        network: the name of the network, in ``ours.FULL``.
        needs: the modules that it imports.
        make: makes the pair from our network, of any size. It raises ``Absent`` if the peer cannot
            do the work.
    """

    network: str
    needs: tuple[str, ...]
    make: Callable[[Network], Pair]

    def missing(self) -> list[str]:
        """Return the modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def _flax(name: str, task: str, network: Network) -> Pair:
    from jaxprop.bench.peers import in_flax, in_jax

    return getattr(in_jax, task)(network, in_flax.peer(name, network))


def _equinox(name: str, network: Network) -> Pair:
    from jaxprop.bench.peers import in_equinox, in_jax

    return in_jax.gradient(network, in_equinox.peer(name, network))


def _with_refs(name: str, network: Network) -> Pair:
    if not hasattr(jax, "new_ref") or not hasattr(jax.vjp(lambda x: x, 1.0)[1], "with_refs"):
        raise Absent(f"jax {jax.__version__} has no with_refs")
    return _flax(name, "accumulated", network)


def _torch(name: str, compiled: bool, last: bool, network: Network) -> Pair:
    from jaxprop.bench.peers import in_torch

    return in_torch.gradient(network, in_torch.peer(name, network, last), compiled)


def _opacus(name: str, task: str, network: Network) -> Pair:
    from jaxprop.bench.peers import by_opacus

    return getattr(by_opacus, task)(network, by_opacus.peer(name, network), tied=name == "gpt")


def _backpack(name: str, asked: str, network: Network) -> Pair:
    if name == "gpt":
        raise Absent("BackPACK has no norms of a LayerNorm, nor of a table that is used twice")
    from jaxprop.bench.peers import by_backpack, in_torch

    peer = in_torch.peer(name, network)
    if asked == "norms":
        return by_backpack.norms(network, peer)
    return by_backpack.quantity(network, peer, asked)


OF_DENSE = ("second-moment", "variance", "diag-ggn", "diag-ggn-mc", "kflr", "kfac", "grads")


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def add(row: str, make: Callable[..., Pair], *args: object, needs: tuple[str, ...]) -> None:
        rows[f"{name}{row}"] = Row(name, needs, functools.partial(make, name, *args))

    torch, opacus, backpack = ("torch",), ("torch", "opacus"), ("torch", "backpack")
    for name in FULL:
        add("/flax", _flax, "gradient", needs=("flax",))
        add("/equinox", _equinox, needs=("equinox",))
        add("/torch", _torch, False, False, needs=torch)
        add("/torch-compiled", _torch, True, False, needs=torch)
        if name == "3c3d":
            add("/torch-last", _torch, False, True, needs=torch)
            add("/torch-last-compiled", _torch, True, True, needs=torch)
        add("-norms/opacus", _opacus, "norms", needs=opacus)
        add("-norms/backpack", _backpack, "norms", needs=backpack)
        add("-clipped/opacus", _opacus, "clipped", needs=opacus)
        add("-clipped/jax-privacy", _flax, "clipped", needs=("flax", "jax_privacy"))
        add("-parts/with_refs", _with_refs, needs=("flax",))
        for asked in OF_DENSE if name == "mlp" else ():
            add(f"-{asked}/backpack", _backpack, asked, needs=backpack)
    return rows


ROWS = _rows()
