"""Hold a layer's ``backward`` against what it must be."""

from jaxprop.checking.check import check_layer

__all__ = ["check_layer"]
