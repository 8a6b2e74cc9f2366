"""The angle between a net's gradient and the derivative."""

from __future__ import annotations

import jax

from jaxprop.core.arrays import angle
from jaxprop.core.batch import Batch
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.tree import learned
from jaxprop.core.types import OfBatch, Params
from jaxprop.core.walk import check_net_and_loss
from jaxprop.training.gradients import autodiff, value_and_grad


def angles(net: Layer, loss: Loss) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, the angle of each param's gradient to the derivative.

    The result is a tree like the learned params, in degrees: 0 where the net's backward is the
    derivative, 90 where it says nothing about it, NaN where one of the two is 0. The derivative is
    that of autodiff.

    Args:
        net: a network with backward rules.
        loss: the loss.
    """
    check_net_and_loss(net, loss)
    by_rule, by_autodiff = value_and_grad(net, loss), autodiff(net, loss)

    def of_both(params: Params, batch: Batch) -> Params:
        given = {"weights": batch.weights, "divisor": batch.divisor}
        (_, ours), (_, true) = (
            f(params, batch.x, batch.target, **given) for f in (by_rule, by_autodiff)
        )
        return jax.tree.map(angle, learned(ours), learned(true))

    return of_batch("angles", "Return the angle of each gradient to the derivative.", net, of_both)
