"""Reads, checks, turns and writes NIfTI files."""
