"""Factored cotangents, a class for each way in which a parameter meets its input."""

from jaxprop.core.forms.composed import Joint, Repeated, joint, over_layers
from jaxprop.core.forms.form import Factored, Kronecker, Stacked, is_factored, sq_norms
from jaxprop.core.forms.outer import Outer, Sum, gram, reached, weighted

__all__ = [
    "Factored",
    "Joint",
    "Kronecker",
    "Outer",
    "Repeated",
    "Stacked",
    "Sum",
    "gram",
    "is_factored",
    "joint",
    "over_layers",
    "reached",
    "sq_norms",
    "weighted",
]
