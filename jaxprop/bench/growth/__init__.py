"""The measurements of ``jaxprop bench --growth``: time and memory against the size of the work."""
