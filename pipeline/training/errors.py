"""Errors that end a training, because another try would fail too."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the slices of the batch."""


class OutOfMemoryError(RuntimeError):
    """A batch does not fit into memory. The message gives the size of the batch and what to try."""
