"""Any JAX function as a layer: its params' forms, by tapping the places where params meet data."""
