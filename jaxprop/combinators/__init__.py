"""Layers made of layers, a file for each; ``jp.chain`` and so on make them."""
