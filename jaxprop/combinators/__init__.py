"""Layers made of layers, a file for each; functions such as ``jp.chain`` make them."""
