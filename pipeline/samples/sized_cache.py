"""A cache with a limit in bytes, since slices differ in size by a factor of ten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SizedCache(Generic[T]):
    """Keeps the most recently used results of `make(key)`, as many as fit into `budget` bytes.

    `size` gives the bytes of a result. A result larger than the budget is not kept.
    """

    def __init__(self, make: Callable[[int], T], size: Callable[[T], int], budget: int) -> None:
        self._make, self._size, self.budget = make, size, budget
        self._kept: OrderedDict[int, T] = OrderedDict()
        self.held = 0

    def __call__(self, key: int) -> T:
        """The result for `key`: from the cache, or made now."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._make(key)
        size = self._size(value)
        if size > self.budget:
            return value
        self._kept[key] = value
        self.held += size
        while self.held > self.budget:
            self.held -= self._size(self._kept.popitem(last=False)[1])
        return value

    def __len__(self) -> int:
        return len(self._kept)
