"""The measurements of ``jaxprop bench --peers``: jaxprop and other libraries at the same work."""
