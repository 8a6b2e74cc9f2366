"""Factored cotangents: what a parameter's cotangent is made of, before it is summed."""

from jaxprop.factored.composed import Joint, Repeated, joint, over_layers
from jaxprop.factored.form import Factored, Kronecker, Stacked, is_factored, wide
from jaxprop.factored.gradient import factored, gradient, like, summed
from jaxprop.factored.outer import Outer, Sum, gram, reached, weighted

__all__ = [
    "Factored",
    "Joint",
    "Kronecker",
    "Outer",
    "Repeated",
    "Stacked",
    "Sum",
    "factored",
    "gradient",
    "gram",
    "is_factored",
    "joint",
    "like",
    "over_layers",
    "reached",
    "summed",
    "weighted",
    "wide",
]
