"""What a frozen SDNet says of an image, and how well its two factors are kept apart."""
