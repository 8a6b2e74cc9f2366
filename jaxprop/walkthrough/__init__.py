"""The worked example, as text for the terminal, as JSON, and as a page to step through."""
