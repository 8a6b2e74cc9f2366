"""The backward pass as something to read."""
