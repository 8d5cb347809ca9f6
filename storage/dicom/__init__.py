"""Reads DICOM studies: the attributes of their images, which of these are the short-axis cine, and its volumes."""
