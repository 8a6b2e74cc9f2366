"""Losses: one value for each example, and the cotangent that the walk starts from.

``forward`` takes the net's output y and the target, with the example on axis 0, and returns a value
for each example. ``backward`` returns the cotangent of y for each example's *own* loss. The scalar
loss is the mean over examples. The 1/N enters where the mean is taken, not here.

Values and cotangents are computed in at least float32: in bfloat16, p - 1 is 0 from p = 0.998 on.
The walk casts the cotangent to the dtype of y.
"""

from jaxprop.losses.binary import BinaryCrossEntropy
from jaxprop.losses.cross_entropy import CrossEntropy
from jaxprop.losses.function import loss
from jaxprop.losses.mean import Mean
from jaxprop.losses.squared_error import HalfSquaredError
from jaxprop.losses.total import total_loss

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "HalfSquaredError",
    "Mean",
    "loss",
    "total_loss",
]
