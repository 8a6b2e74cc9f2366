"""The worked example: as text for the terminal, as JSON, and as an HTML page."""
