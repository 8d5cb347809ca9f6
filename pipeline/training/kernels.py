"""How a step is computed: compiled, by the convolutions that are fastest here, or with the same bits every time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from storage.errors import one_line

log = logging.getLogger(__name__)

WORTH_COMPILING = 3000  # steps on a GPU: compiling takes half a minute, and then saves about 10 ms a step


class Compiled:
    """A function of tensors by `torch.compile`: one graph forward and one backward, on a GPU replayed as CUDA graphs.

    Every combination of shapes is compiled at its first call. Where that fails (no compiler on this machine, a graph
    that cannot be whole), the function itself is used from then on, and one line is logged.
    What a call returns is overwritten by the next call on a GPU: copy what is kept.
    """

    def __init__(self, function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> None:
        import torch._functorch.config as aot

        # or what the backward graph lacks would show only within `backward`, where nothing can be called instead
        if hasattr(aot, "force_non_lazy_backward_lowering"):  # torch 2.7
            aot.force_non_lazy_backward_lowering = True
        mode = "reduce-overhead" if backend == "inductor" else None
        self._plain = function
        self._fast: Callable[..., Any] | None = torch.compile(
            function, backend=backend, fullgraph=True, dynamic=False, mode=mode
        )

    @property
    def works(self) -> bool:
        """Whether calls are still compiled ones."""
        return self._fast is not None

    def __call__(self, image: torch.Tensor, *rest: Any) -> Any:
        """The function's result."""
        if self._fast is not None:
            if image.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            try:
                return self._fast(image, *rest)
            except Exception as error:  # what compilers raise has no class in common
                self._fast = None
                cause = getattr(error, "inner_exception", error)
                log.warning("torch.compile failed, steps are taken without it: %s", one_line(cause))
        return self._plain(image, *rest)


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
