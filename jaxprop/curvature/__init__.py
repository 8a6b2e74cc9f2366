"""Solving, sampling and influence with a curvature: ``jp.curvature``.

A curvature F is a tree like params with a block at each leaf: a ``Kronecker`` from
``jp.kronecker_factors``, an ``Eigen`` from ``ekfac_factors`` or ``eigh``, an array like the param
from ``jp.diag_ggn``, or ``()`` for no block. ``jp.kfac`` and ``jp.laplace`` are built on these.

    algebra      eigh  times  solve  whiten  logdet
    curvatures   ekfac_factors  diag_hessian  Eigen  Kronecker
    quantity     EigenvalueCorrection
    influence    influence  self_influence
    trees        is_block
"""

from jaxprop.core.forms import Kronecker
from jaxprop.curvature.algebra import Eigen, eigh, is_block, logdet, solve, times, whiten
from jaxprop.curvature.ekfac import EigenvalueCorrection, ekfac_factors
from jaxprop.curvature.hessian import diag_hessian
from jaxprop.curvature.influence_functions import influence, self_influence

__all__ = [
    "Eigen",
    "EigenvalueCorrection",
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
