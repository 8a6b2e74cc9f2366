"""jaxprop: backpropagation for JAX with the backward pass in the open."""

from jaxprop.backprop import loss_fn, walk
from jaxprop.checking import check_layer
from jaxprop.combinators import chain, skip
from jaxprop.factored import Factored, Outer, Sum
from jaxprop.layer import Layer, Step
from jaxprop.layers import Affine, Dense, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.losses import BinaryCrossEntropy, CrossEntropy, HalfSquaredError, Loss
from jaxprop.training import make_update, value_and_grad
