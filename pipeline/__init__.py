"""The work on arrays: pure functions and modules in numpy and torch."""
