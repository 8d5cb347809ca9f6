"""The type of the functions that receive a stage's progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is being done, pieces done, pieces in all)
