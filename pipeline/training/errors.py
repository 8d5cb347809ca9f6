"""Errors that end a training, because another try would fail too."""

from __future__ import annotations


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The message names the step and the slices of the batch.

    own: the loss itself is not finite. Of several workers only those have it so whose slices are to blame; the others
    share the sum of the gradients.
    """

    def __init__(self, text: str, own: bool = True) -> None:
        super().__init__(text, own)  # both, since pickle rebuilds the error from them
        self.own = own

    def __str__(self) -> str:
        return str(self.args[0])


class OutOfMemoryError(RuntimeError):
    """A batch does not fit into memory. The message gives the size of the batch and what to try."""
