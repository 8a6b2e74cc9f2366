"""Explanations of a backward pass for any network: ``jp.explain`` and ``jp.find_nonfinite``."""
