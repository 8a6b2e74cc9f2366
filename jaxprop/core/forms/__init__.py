"""Factored cotangents, a class for each way in which a parameter meets its input."""

from jaxprop.core.forms.composed import Joint, Repeated, joint
from jaxprop.core.forms.form import (
    Factored,
    Kronecker,
    OfX,
    Stacked,
    is_factored,
    norm_of_all,
    norms,
    norms_of_all,
    sq_norms,
)
from jaxprop.core.forms.outer import Outer, Sum, count_of, gram, mean_of_real, of_real
from jaxprop.core.forms.rearranged import (
    Move,
    Moves,
    Rearranged,
    Reshaped,
    Scanned,
    Sliced,
    Transposed,
    Turned,
    in_place,
)

__all__ = [
    "Factored",
    "Joint",
    "Kronecker",
    "Move",
    "Moves",
    "OfX",
    "Outer",
    "Rearranged",
    "Repeated",
    "Reshaped",
    "Scanned",
    "Sliced",
    "Stacked",
    "Sum",
    "Transposed",
    "Turned",
    "count_of",
    "gram",
    "in_place",
    "is_factored",
    "joint",
    "mean_of_real",
    "norm_of_all",
    "norms",
    "norms_of_all",
    "of_real",
    "sq_norms",
]
