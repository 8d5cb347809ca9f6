"""The factors that a frozen SDNet finds in an image, and how well anatomy and modality are separated."""
