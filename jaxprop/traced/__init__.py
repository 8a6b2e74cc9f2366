"""Any JAX function as a layer: taps at the places where params meet data give the params' forms."""
