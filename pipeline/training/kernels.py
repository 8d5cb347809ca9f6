"""How a step is computed: compiled, with the fastest convolutions, the same bits every time, or emulated bf16."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import one_line

log = logging.getLogger(__name__)

BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # torch's names of x86's and ARM's instructions for bf16
WORTH_COMPILING = 3000  # steps on a GPU: compiling takes half a minute and saves about 10 ms a step


class Compiled:
    """A function of tensors and of a module's weights, compiled with `torch.compile`. It returns scalars by name.

    There is one graph forward and one backward; a GPU replays them as CUDA graphs. Every combination of shapes is
    compiled at its first call. If compiling fails (no compiler on this machine, or a function that is not one graph),
    one line is logged, and from then on the function runs without compiling. On a GPU, each call overwrites the result
    of the call before, so copy results that you keep.
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
        """Whether calls still run compiled code. False once compiling has failed."""
        return self._fast is not None

    def __call__(self, image: Tensor, *rest: Any) -> dict[str, Tensor]:
        """Call the function, compiled if possible, and return its scalars by name."""
        if self._fast is not None:
            shapes = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in (image, *rest))
            try:
                if shapes not in self._tried:
                    self._try(self._fast, image, *rest)
                    self._tried.add(shapes)
                return self._result(self._fast, image, *rest)
            except Exception as error:  # the errors of compilers share no base class
                self._fast = None
                cause = getattr(error, "inner_exception", error)
                log.warning("torch.compile failed, steps are taken without it: %s", one_line(cause))
        return self._plain(image, *rest)

    def _try(self, fast: Callable[..., dict[str, Tensor]], *arguments: Any) -> None:
        """Compile for these shapes by a trial call, forward and backward, which leaves the module as it was.

        The backward pass is compiled when it first runs. If that failed in the caller's own backward pass, it would be
        too late to fall back to the plain function.
        """
        before = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        try:
            total = torch.stack(list(self._result(fast, *arguments).values())).sum()
            if total.requires_grad:
                torch.autograd.grad(total, list(self._module.parameters()), allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, value in before:  # the trial call has changed batch-norm's statistics
                    buffer.copy_(value)

    @staticmethod
    def _result(fast: Callable[..., dict[str, Tensor]], image: Tensor, *rest: Any) -> dict[str, Tensor]:
        if image.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        return fast(image, *rest)


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, let cuDNN try its algorithms for every new shape and keep the fastest. Pays if shapes recur."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = before or (device.type == "cuda" and not torch.are_deterministic_algorithms_enabled())
    try:
        yield
    finally:
        cudnn.benchmark = before


def same_bits_every_time() -> None:
    """Make steps give the same bits every time on the same kind of GPU. Call it before the process uses the GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # Warn only: 2 × 2 pooling is listed as not deterministic, but it is here, since its windows do not overlap.
    torch.use_deterministic_algorithms(True, warn_only=True)


def lacks_bf16(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether a processor computes bf16 without instructions for it, so that it is slower than fp32.

    `capabilities` is what `torch.cpu.get_capabilities` tells; if not given, this processor's. A torch too old to tell
    gives False.
    """
    if capabilities is None:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities) and not any(capabilities.get(name) for name in BF16_UNITS)
