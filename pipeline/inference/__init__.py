"""Apply trained networks to studies."""
