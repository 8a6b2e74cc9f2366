"""The backward pass as something to read: as values, as text, as a page."""
