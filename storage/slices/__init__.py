"""The slice store: images and masks of every subject."""
