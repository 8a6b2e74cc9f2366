"""``jaxprop bench --target``: the cost of the rows on a device that this machine may lack."""
