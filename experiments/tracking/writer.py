"""A thread that repeats each task until it succeeds, so that a server that is away delays nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # between tries


class LogWriter:
    """Carries out named tasks in one thread, in the order in which their names first came.

    A new task replaces a waiting task of the same name. A task that fails is tried again, at growing intervals; `reset`
    is called before. So a task must describe a state to be reached, not a change. `is_away` says whether other tasks
    would meet the same error. `on_change` is called with the error when tasks begin to fail, and with None when all
    succeed again. `post` never waits for a task and never raises.
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
        """Give the thread a task. The first call starts the thread."""
        with self._changed:
            self._tasks[name] = task
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, name: str) -> BaseException | None:
        """Wait until this task is done, or until a round of tasks fails; returns the error if the task is not done."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._tasks or self.error is not None)
            return self.error if name in self._tasks else None

    def close(self, patience_s: float) -> list[str]:
        """Wait until all tasks are done, and give up if tasks still fail after `patience_s`. Returns the names of those
        not done.

        While tasks succeed or have not been tried yet, it goes on waiting, also if others failed before.
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
        """Try every task once, but stop if the store is away. Returns the last error, or None."""
        failed: BaseException | None = None
        with self._changed:
            names = list(self._tasks)
        for name in names:
            with self._changed:
                task = self._tasks[name]
            try:
                task()
            except Exception as error:  # no error may end the training, and it may pass
                failed, self._answers = error, False
                if self._is_away(error):
                    break
            else:
                self._done(name, task)
        self._note(failed)
        return failed

    def _done(self, name: str, task: Callable[[], object]) -> None:
        with self._changed:
            if self._tasks.get(name) is task:  # otherwise a newer one has replaced it meanwhile
                del self._tasks[name]
            self.succeeded = self._answers = True
            self._changed.notify_all()

    def _note(self, failed: BaseException | None) -> None:
        with self._changed:
            was, self.error = self.error, failed
            self._changed.notify_all()
        if (was is None) != (failed is None):
            self._on_change(failed)
