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


class LeaseLostError(FinalError):
    """Another driver has taken over the run, so that this one may not write any more."""


def one_line(error: BaseException, *, last: bool = False, trusted: bool = True, skip: str = "\n") -> str:
    """An exception as one line for a person: the exception inside a remote failure, a system error without its path.

    `last` takes a text's last line, where what went wrong stands below a traceback. Without `trusted`, texts that are
    not ours are left out, since they may name folders: then the exception's type stands for it. Lines that begin with
    `skip` do not count.
    """
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = str(cause).strip() if trusted or isinstance(cause, (InputError, StageError)) else ""
    lines = [line for line in text.splitlines() if line and not line.startswith(skip)]
    return lines[-1 if last else 0] if lines else type(cause).__name__
