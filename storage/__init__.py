"""Bytes on disk: NIfTI in and out, data set layouts, the slice store and the factor bank."""
