"""The check of a layer's ``backward`` against independent oracles: ``jp.check_layer``."""
