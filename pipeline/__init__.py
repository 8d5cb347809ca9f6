"""What happens to arrays: pure functions and modules of numpy and torch."""
