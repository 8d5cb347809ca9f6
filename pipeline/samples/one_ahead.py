"""Batches are fetched, and copied to the device, one ahead: while one is used, the next one is on its way."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType

import torch
from torch import Tensor

from pipeline.samples.maker import UPLOADED

STUCK_S = 30.0  # how long the error of a trainer waits for the fetch that is under way

Batch = dict[str, Tensor]


class OneAhead:
    """The batches of `made`, in order: images, masks and twins on `device`, all else as it is.

    A thread fetches them, from the moment on when this is made. To a GPU they go through one pinned buffer, on a stream
    of their own. Use it as a context manager; its end closes `made`. Raises what `made` raises.

    If the trainer fails while `made` waits for long, such as for a node, its error does not wait with it; `made` then
    stays open until the process ends.
    """

    def __init__(self, made: Generator[Batch], device: str) -> None:
        self._made, self._device = made, torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pinned: Batch = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(self._fetch)

    def __enter__(self) -> OneAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not wait([self._next], STUCK_S).done:
            self._thread.shutdown(wait=False)
            return
        self._thread.shutdown()  # waits for the fetch under way: a generator cannot be closed while it runs
        self._made.close()

    def __iter__(self) -> OneAhead:
        return self

    def __next__(self) -> Batch:
        batch = self._next.result()
        if batch is None:
            raise StopIteration
        self._next = self._thread.submit(self._fetch)
        if self._stream is not None:  # copied on the thread's stream, used on the current one
            for name in UPLOADED:
                if name in batch:
                    batch[name].record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _fetch(self) -> Batch | None:
        batch = next(self._made, None)
        if batch is None or self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            sent = {name: self._sent(name, batch[name]) for name in UPLOADED if name in batch}
        self._stream.synchronize()  # in this thread, so that the trainer does not wait, and the buffer is free again
        return batch | sent

    def _sent(self, name: str, values: Tensor) -> Tensor:
        buffer = self._pinned.get(name)
        if buffer is None or buffer.shape != values.shape:
            buffer = self._pinned[name] = torch.empty_like(values, pin_memory=True)
        return buffer.copy_(values).to(self._device, non_blocking=True)
