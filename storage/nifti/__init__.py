"""NIfTI in and out."""
