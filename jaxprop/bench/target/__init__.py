"""``jaxprop bench --target``: what the rows cost on a device that need not be there."""
