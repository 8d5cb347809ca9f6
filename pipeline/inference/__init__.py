"""A trained network applied to studies."""
