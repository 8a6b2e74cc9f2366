"""The contract: layers, losses, the forms of a cotangent, and the walk back through a network."""
