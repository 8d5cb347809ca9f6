"""The name of a bank's factors, made of the network's fingerprint and the precision."""

from __future__ import annotations

from typing import get_args

from pipeline.networks.config import Precision


def factors_name(sdnet_fingerprint: str, precision: Precision) -> str:
    """The name of a network run in a precision: the fingerprint, with `-bf16` appended for bfloat16.

    In bfloat16 the weights are other numbers and some bits of the anatomy differ. So its factors count as those of
    another network and are never mixed with float32 factors in one bank.
    """
    return sdnet_fingerprint if precision == "fp32" else f"{sdnet_fingerprint}-{precision}"


def precision_of(name: str, sdnet_fingerprint: str) -> Precision | None:
    """The precision in which the network of that fingerprint makes factors of this name; None for another network."""
    choices: tuple[Precision, ...] = get_args(Precision)
    return next((p for p in choices if factors_name(sdnet_fingerprint, p) == name), None)
