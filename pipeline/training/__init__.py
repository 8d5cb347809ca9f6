"""Training steps, losses, and the state that survives an interruption."""
