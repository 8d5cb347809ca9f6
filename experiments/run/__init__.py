"""One run and its stages, from settings to the report."""
