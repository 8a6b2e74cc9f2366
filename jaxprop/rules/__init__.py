"""Backward rules that replace the derivative, ``jp.rules``.

Each rule is a wrapper or a layer that keeps the usual forward and has another ``backward``. Every
quantity, clipping and update then uses *that* backward. ``jp.check_layer`` knows that it is not the
derivative: it checks everything else, and returns the angle between the two.
"""

from jaxprop.rules.affine import lrp_alpha_beta, lrp_epsilon, lrp_flat, lrp_gamma, lrp_z_box
from jaxprop.rules.alignment import angles
from jaxprop.rules.attribution import (
    deconvolution,
    gradient_times_input,
    guided_backprop,
    integrated_gradients,
    relevance,
    saliency,
    smooth_grad,
)
from jaxprop.rules.cotangents import (
    clip_cotangent,
    noisy_cotangent,
    quantize_cotangent,
    reverse_gradient,
    scale_gradient,
    stop_gradient,
)
from jaxprop.rules.direct import direct_feedback_alignment
from jaxprop.rules.discrete import one_hot_argmax, straight_through, top_k
from jaxprop.rules.feedback import feedback_alignment, kolen_pollack, sign_symmetric
from jaxprop.rules.propagation import lrp
from jaxprop.rules.spiking import Lif, Spike

__all__ = [
    "Lif",
    "Spike",
    "angles",
    "clip_cotangent",
    "deconvolution",
    "direct_feedback_alignment",
    "feedback_alignment",
    "gradient_times_input",
    "guided_backprop",
    "integrated_gradients",
    "kolen_pollack",
    "lrp",
    "lrp_alpha_beta",
    "lrp_epsilon",
    "lrp_flat",
    "lrp_gamma",
    "lrp_z_box",
    "noisy_cotangent",
    "one_hot_argmax",
    "quantize_cotangent",
    "relevance",
    "reverse_gradient",
    "saliency",
    "scale_gradient",
    "sign_symmetric",
    "smooth_grad",
    "stop_gradient",
    "straight_through",
    "top_k",
]
