"""Forms (``jp.forms``): the factors of a parameter's cotangent.

A layer's ``backward`` returns a form for each of its params, and a quantity is computed from forms.
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
