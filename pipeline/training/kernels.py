"""How a step is computed: compiled, by the convolutions that are fastest here, or with the same bits every time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import one_line

log = logging.getLogger(__name__)

WORTH_COMPILING = 3000  # steps on a GPU: compiling takes half a minute, and then saves about 10 ms a step


class Compiled:
    """A function of tensors and of a module's weights, which returns scalars by name, by `torch.compile`: one graph
    forward and one backward, on a GPU replayed as CUDA graphs.

    Every combination of shapes is compiled at its first call. Where that fails (no compiler on this machine, a graph
    that cannot be whole), the function itself is used from then on, and one line is logged.
    What a call returns is overwritten by the next call on a GPU: copy what is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., dict[str, Tensor]],
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        mode = "reduce-overhead" if backend == "inductor" else None
        self._module, self._plain = module, function
        self._fast: Callable[..., dict[str, Tensor]] | None = torch.compile(
            function, backend=backend, fullgraph=True, dynamic=False, mode=mode
        )
        self._tried: set[tuple[Any, ...]] = set()

    @property
    def works(self) -> bool:
        """Whether calls are still compiled ones."""
        return self._fast is not None

    def __call__(self, image: Tensor, *rest: Any) -> dict[str, Tensor]:
        """The function's result."""
        if self._fast is not None:
            shapes = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in (image, *rest))
            try:
                if shapes not in self._tried:
                    self._try(self._fast, image, *rest)
                    self._tried.add(shapes)
                return self._result(self._fast, image, *rest)
            except Exception as error:  # what compilers raise has no class in common
                self._fast = None
                cause = getattr(error, "inner_exception", error)
                log.warning("torch.compile failed, steps are taken without it: %s", one_line(cause))
        return self._plain(image, *rest)

    def _try(self, fast: Callable[..., dict[str, Tensor]], *arguments: Any) -> None:
        """Compile for these shapes by a call that leaves no trace. It goes backward too: that pass is compiled when it
        first runs, and within the caller's it would be too late to take the function itself."""
        before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        try:
            total = torch.stack(list(self._result(fast, *arguments).values())).sum()
            if total.requires_grad:
                torch.autograd.grad(total, list(self._module.parameters()), allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, value in before:  # batch-norm's statistics have moved
                    buffer.copy_(value)

    @staticmethod
    def _result(fast: Callable[..., dict[str, Tensor]], image: Tensor, *rest: Any) -> dict[str, Tensor]:
        if image.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return fast(image, *rest)


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, cuDNN tries its algorithms for every new shape and keeps the fastest: for shapes that come back."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or (device.type == "cuda" and not torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        cudnn.benchmark = before


def same_bits_every_time() -> None:
    """This process's steps give the same bits again on the same kind of GPU. To be called before it is used."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # A warning, no error: 2 × 2 pooling is listed as not deterministic, but its windows do not overlap.
    torch.use_deterministic_algorithms(True, warn_only=True)
