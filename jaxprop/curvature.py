"""What is done with a curvature, ``jp.curvature``: solving, sampling, influence.

A curvature F is a tree like params with a block at each leaf: a ``Kronecker`` of
``jp.kronecker_factors``, an ``Eigen`` of ``ekfac_factors`` or of ``eigh``, an array like the param
of ``jp.diag_ggn``, or ``()`` for none. ``jp.kfac`` and ``jp.laplace`` are made of these.

    algebra      eigh  times  solve  whiten  logdet
    curvatures   ekfac_factors  diag_hessian  Eigen  Kronecker
    influence    influence  self_influence
    trees        is_block
"""

from jaxprop.core.forms import Kronecker
from jaxprop.quantity.diagonals import diag_hessian
from jaxprop.quantity.functions import ekfac_factors
from jaxprop.quantity.influence import influence, self_influence
from jaxprop.quantity.kronecker import Eigen, eigh, is_block, logdet, solve, times, whiten

__all__ = [
    "Eigen",
    "Kronecker",
    "diag_hessian",
    "eigh",
    "ekfac_factors",
    "influence",
    "is_block",
    "logdet",
    "self_influence",
    "solve",
    "times",
    "whiten",
]
