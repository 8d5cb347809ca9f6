"""Everything on disk: NIfTI and DICOM files, data set layouts, the slice store and the factor bank."""
