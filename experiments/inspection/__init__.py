"""The verb `inspect`'s page."""
