"""Quantities, the results that a walk back can return besides the gradient: ``jp.quantity``.

Request one by ``jp.quantities(net, loss, name=Quantity())``; most also have their own function,
such as ``jp.per_example_sq_norms``.
"""

from jaxprop.core.forms import Kronecker, Sides
from jaxprop.quantity.aux import Aux
from jaxprop.quantity.base import PerExample, Quantity
from jaxprop.quantity.clipping import Clipped, ClippedMean, automatic, next_max_norm, normalized
from jaxprop.quantity.curvature import AddedUp, DiagGGN, GGNRoot, KroneckerFactors
from jaxprop.quantity.noise import Averaged, NoiseAverage, NoiseParts, NoiseScale
from jaxprop.quantity.per_example import (
    Factors,
    Gradient,
    Gram,
    Output,
    PerExampleGrads,
    SecondMoment,
    SqNorms,
    Variance,
)
from jaxprop.quantity.projected import Projected, principal
from jaxprop.quantity.source import HessianRoot, LossGradient, Source

__all__ = [
    "AddedUp",
    "Aux",
    "Averaged",
    "Clipped",
    "ClippedMean",
    "DiagGGN",
    "Factors",
    "GGNRoot",
    "Gradient",
    "Gram",
    "HessianRoot",
    "Kronecker",
    "KroneckerFactors",
    "LossGradient",
    "NoiseAverage",
    "NoiseParts",
    "NoiseScale",
    "Output",
    "PerExample",
    "PerExampleGrads",
    "Projected",
    "Quantity",
    "SecondMoment",
    "Sides",
    "Source",
    "SqNorms",
    "Variance",
    "automatic",
    "next_max_norm",
    "normalized",
    "principal",
]
