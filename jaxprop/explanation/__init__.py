"""The backward pass of any network as values to read: ``jp.explain`` and ``jp.find_nonfinite``."""
