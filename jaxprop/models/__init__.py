"""Well-known networks, built from this library's layers."""

from jaxprop.models.generation import decoder, generate
from jaxprop.models.images import all_cnn_c, three_c3d
from jaxprop.models.language import Gpt2Config, gpt2
from jaxprop.models.published import gpt2_params, gpt2_tensors, load_gpt2

__all__ = [
    "Gpt2Config",
    "all_cnn_c",
    "decoder",
    "generate",
    "gpt2",
    "gpt2_params",
    "gpt2_tensors",
    "load_gpt2",
    "three_c3d",
]
