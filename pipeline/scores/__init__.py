"""Metrics, tables, volumes, and comparisons between arms."""
