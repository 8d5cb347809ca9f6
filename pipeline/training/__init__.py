"""Training steps, losses, and the state that goes on after an interruption."""
