"""The one error that a user can mend: what is wrong, where, and what to do."""

from __future__ import annotations


class InputError(Exception):
    """Bad input, told in one line: `where: problem; remedy`.

    `where` names a file, subject or setting without its folder, so that the line may go into a log or a table as it is.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        # All three go to Exception's args: that is what pickle rebuilds the error from in another process.
        super().__init__(where, problem, remedy)
        self.where = where
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.remedy}"


class StageError(Exception):
    """A stage of a run failed for a reason that is not the user's input; one line, without a traceback."""


class FinalError(StageError):
    """A StageError that another try would only meet again."""
