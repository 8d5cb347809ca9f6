"""What ends a training that no second try would mend."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite; names the step and the slices of the batch."""


class OutOfMemoryError(RuntimeError):
    """A batch does not fit the memory; says how large it was and what to try."""
