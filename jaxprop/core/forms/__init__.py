"""Factored cotangents, a class for each way in which a parameter meets its input."""

from jaxprop.core.forms.biased import Biased, with_bias
from jaxprop.core.forms.composed import Joint, Repeated, joint
from jaxprop.core.forms.form import (
    Factored,
    Kronecker,
    OfX,
    Sides,
    Stacked,
    is_factored,
    norm_of_all,
    norms,
    norms_of_all,
    sq_norms,
    through,
)
from jaxprop.core.forms.moves import (
    Move,
    Moves,
    Place,
    Reshaped,
    Scanned,
    Sliced,
    Transposed,
    Turned,
    in_place,
)
from jaxprop.core.forms.outer import (
    Outer,
    Sum,
    count_of,
    gram,
    mean_of_real,
    of_real,
    pairs_are_cheaper,
)
from jaxprop.core.forms.rearranged import Rearranged

__all__ = [
    "Biased",
    "Factored",
    "Joint",
    "Kronecker",
    "Move",
    "Moves",
    "OfX",
    "Outer",
    "Place",
    "Rearranged",
    "Repeated",
    "Reshaped",
    "Scanned",
    "Sides",
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
    "pairs_are_cheaper",
    "sq_norms",
    "through",
    "with_bias",
]
