"""The name of a bank's factors: network and precision."""

from __future__ import annotations

from typing import get_args

from pipeline.networks.config import Precision


def factors_name(sdnet_fingerprint: str, precision: Precision) -> str:
    """Names the network as it is run. In bfloat16 its weights are other numbers and a few bits come out otherwise, so
    that its factors are another network's and never stand in one bank with those of float32."""
    return sdnet_fingerprint if precision == "fp32" else f"{sdnet_fingerprint}-{precision}"


def precision_of(name: str, sdnet_fingerprint: str) -> Precision | None:
    """How the network of that fingerprint is run to make the factors of that name; None if they are another's."""
    choices: tuple[Precision, ...] = get_args(Precision)
    return next((p for p in choices if factors_name(sdnet_fingerprint, p) == name), None)
