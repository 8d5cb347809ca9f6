"""The errors that a user sees: InputError for what the user can fix, StageError for every other failure of a stage."""

from __future__ import annotations


class InputError(Exception):
    """Bad input, described in one line: `where: problem; remedy`.

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
    """A stage of a run failed, but not because of the user's input. It is shown in one line, without a traceback."""


class FinalError(StageError):
    """A StageError that would only happen again if the stage were tried again."""


class LeaseLostError(FinalError):
    """Another driver has taken over the run, so this driver must not write to it any more."""


def one_line(error: BaseException, *, last: bool = False, trusted: bool = True, skip: str = "\n") -> str:
    """Describe an exception in one line for a person.

    If it has a `cause` (as the failure of a remote task has), the line describes that exception. A system error is
    described without its path. `last` takes the last line of a text that begins with a traceback, instead of the first.
    If `trusted` is false, only texts of InputError and StageError are used, since others may name folders; the
    exception's type replaces them. Lines that begin with `skip` are ignored.
    """
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = str(cause).strip() if trusted or isinstance(cause, (InputError, StageError)) else ""
    lines = [line for line in text.splitlines() if line and not line.startswith(skip)]
    return lines[-1 if last else 0] if lines else type(cause).__name__
