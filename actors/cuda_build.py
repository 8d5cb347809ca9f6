"""Whether torch can use GPUs at all. Nodes without GPUs may have its smaller build."""

from __future__ import annotations

from storage.errors import InputError


def has_cuda() -> bool:
    """Whether this process's torch was built with CUDA, be there a card or not."""
    import torch

    return bool(torch.backends.cuda.is_built())


def cuda_is_missing() -> InputError:
    """The error for a cluster with GPUs whose torch cannot use them."""
    return InputError(
        "torch",
        "is a build without CUDA, and the cluster has GPUs",
        "install a CUDA build, or pass --set resources.gpus=false",
    )
