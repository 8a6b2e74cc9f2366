"""Forms: what a parameter's cotangent is made of, ``jp.forms``.

A layer's ``backward`` returns one for each of its params, and a quantity asks them.
"""

from jaxprop.core.forms import Factored, Joint, Kronecker, Outer, Rearranged, Repeated, Stacked, Sum
from jaxprop.layers.embedding import Rows
from jaxprop.layers.patches import Patches
from jaxprop.layers.positions import Leading

__all__ = [
    "Factored",
    "Joint",
    "Kronecker",
    "Leading",
    "Outer",
    "Patches",
    "Rearranged",
    "Repeated",
    "Rows",
    "Stacked",
    "Sum",
]
