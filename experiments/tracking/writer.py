"""A thread that carries out what it is given until it has succeeded, so that a server that is away delays nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0


class LogWriter:
    """Tasks by name, carried out in the order of their first coming by one thread, which starts with the first one.

    A task of a name that still waits replaces that one. A task that fails is tried again, at longer and longer
    intervals; before that `reset` is called. So a task must describe a state to be reached, not a change. `is_away`
    tells an error that the other tasks would meet as well. `post` never blocks and never raises.
    """

    def __init__(
        self,
        reset: Callable[[], None],
        is_away: Callable[[BaseException], bool],
        on_change: Callable[[BaseException | None], None],
    ) -> None:
        self._reset, self._is_away, self._on_change = reset, is_away, on_change
        self._tasks: dict[str, Callable[[], object]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._ended = self._answers = False
        self.error: BaseException | None = None
        self.succeeded = False

    def post(self, name: str, task: Callable[[], object]) -> None:
        """Have a task carried out, soon."""
        with self._changed:
            self._tasks[name] = task
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, name: str) -> BaseException | None:
        """Wait until this task is done, or tasks fail; returns the error then."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._tasks or self.error is not None)
            return self.error if name in self._tasks else None

    def close(self, patience_s: float) -> list[str]:
        """Wait until all is done, or until tasks have failed for so long; returns the names of those not done.

        As long as tasks succeed, or have not been tried, it waits: also after failures, once one has succeeded.
        """
        began = time.monotonic()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._tasks and (self.error is None or self._answers or time.monotonic() - began < patience_s):
                self._changed.wait(0.2)
            self._ended = True
            self._changed.notify_all()
            return list(self._tasks)

    def _run(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._tasks) or self._ended)
                if self._ended:
                    return
            error = self._round()
            if error is None:
                wait_s = FIRST_WAIT_S
                continue
            self._reset()
            with self._changed:
                if self._closing:
                    self._changed.wait_for(lambda: self._ended, FIRST_WAIT_S)
                else:
                    self._changed.wait_for(lambda: self._closing, wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _round(self) -> BaseException | None:
        """Try every task once; returns the last error."""
        failed: BaseException | None = None
        with self._changed:
            names = list(self._tasks)
        for name in names:
            with self._changed:
                task = self._tasks[name]
            try:
                task()
            except Exception as error:  # whatever it is, training must not end by it, and it may pass
                failed, self._answers = error, False
                if self._is_away(error):
                    break
            else:
                self._done(name, task)
        self._note(failed)
        return failed

    def _done(self, name: str, task: Callable[[], object]) -> None:
        with self._changed:
            if self._tasks.get(name) is task:  # else a newer one came meanwhile
                del self._tasks[name]
            self.succeeded = self._answers = True
            self._changed.notify_all()

    def _note(self, failed: BaseException | None) -> None:
        with self._changed:
            was, self.error = self.error, failed
            self._changed.notify_all()
        if (was is None) != (failed is None):
            self._on_change(failed)
