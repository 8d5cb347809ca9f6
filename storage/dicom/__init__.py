"""DICOM studies in: what files say of their images, which of them are the short-axis cine, and its volumes."""
