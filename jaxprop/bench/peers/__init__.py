"""The measurements of ``jaxprop bench --peers``: the same work by other libraries, in turn."""
