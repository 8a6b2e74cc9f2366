"""Layers made of layers."""

from jaxprop.combinators.branch import branch
from jaxprop.combinators.cast import cast
from jaxprop.combinators.chain import Chain, chain, skip
from jaxprop.combinators.recompute import recompute
from jaxprop.combinators.repeat import repeat
from jaxprop.combinators.shared import shared, tied
from jaxprop.combinators.wrapper import Wrapper

__all__ = [
    "Chain",
    "Wrapper",
    "branch",
    "cast",
    "chain",
    "recompute",
    "repeat",
    "shared",
    "skip",
    "tied",
]
