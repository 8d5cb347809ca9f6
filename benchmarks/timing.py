"""Side-by-side timing in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def rates(sides: dict[str, Callable[[], int]], rounds: int = 5) -> dict[str, float]:
    """Items a second of each side, the median over rounds in which the sides take turns; each callable returns its
    items."""
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()  # warm-up
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            items = side()
            seen[name].append(items / (time.perf_counter() - began))
    return {name: median(values) for name, values in seen.items()}


def ratio(found: dict[str, float], unit: str) -> dict[str, Any]:
    """The JSON line's fields from the rates of `ours` and `reference`."""
    ours, reference = found["ours"], found["reference"]
    return {
        "ratio": round(ours / reference, 2),
        "ours": round(ours, 1),
        "reference": round(reference, 1),
        "unit": unit,
    }
