"""Hold a layer's ``backward`` against what it must be."""
