"""The subjects of a phantom: how many of which vendor in which split, their random streams and their codes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.phantom.vendors import VENDORS

LABELLED, UNLABELLED, TESTING, VALIDATION = "Training/Labeled", "Training/Unlabeled", "Testing", "Validation"
SPLITS: Final = (LABELLED, UNLABELLED, TESTING, VALIDATION)  # only append: positions are part of random streams


class PhantomConfig(BaseModel):
    """The size of a phantom. The defaults take less than half a minute on one core, and about 0.25 GB of disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labelled_a: int = Field(10, ge=0, description="labelled training subjects of vendor A")
    labelled_b: int = Field(10, ge=0, description="labelled training subjects of vendor B")
    unlabelled_c: int = Field(4, ge=0, description="unlabelled training subjects of vendor C")
    testing: int = Field(3, ge=0, description="test subjects of each of A, B, C and D")
    validation: int = Field(0, ge=0, description="labelled validation subjects of each of A, B, C and D")
    subjects: int | None = Field(
        None,
        ge=1,
        validate_default=True,
        description="subjects in all, shared out over vendors and splits in proportion to the counts above, at least 1 "
        "wherever the count is not 0; None: the counts as they are",
    )
    frames: int = Field(8, ge=2, le=100, description="frames of a cine")
    slices: tuple[int, int] = Field((7, 9), description="fewest and most slices of a study")
    field_scale: float = Field(1.0, ge=0.55, le=1.3, description="multiplies every vendor's field of view")
    seed: int = Field(0, ge=0, lt=2**63)

    @field_validator("subjects")
    @classmethod
    def _enough(cls, subjects: int | None, info: ValidationInfo) -> int | None:
        needed = sum(count > 0 for _, _, count in _groups(info.data))
        if needed == 0:
            raise ValueError("every count is 0; give one of labelled_a, labelled_b, unlabelled_c, testing, validation")
        if subjects is not None and subjects < needed:
            raise ValueError(f"must be at least {needed}, one for each vendor and split whose count is not 0")
        return subjects

    @field_validator("slices")
    @classmethod
    def _slices_in_order(cls, slices: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= slices[0] <= slices[1]:
            raise ValueError("must be (fewest, most) with 1 ≤ fewest ≤ most")
        return slices


@dataclass(frozen=True)
class Order:
    """One subject to draw. `serial` counts from 0 within vendor and split."""

    vendor: str
    split: str
    serial: int

    @property
    def stream(self) -> int:
        """The number of the subject's random stream. It does not depend on the number of other subjects."""
        return (ord(self.vendor) << 40) | (SPLITS.index(self.split) << 32) | self.serial

    @property
    def labelled(self) -> bool:
        """Whether the subject has masks."""
        return self.split != UNLABELLED


def orders(config: PhantomConfig) -> list[Order]:
    """All subjects of the configuration, in the order of groups of split and vendor."""
    groups = _groups(config.model_dump())
    counts = [count for _, _, count in groups]
    shares = counts if config.subjects is None else share_out(config.subjects, counts)
    return [Order(vendor, split, i) for (vendor, split, _), n in zip(groups, shares, strict=True) for i in range(n)]


def share_out(total: int, counts: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to `counts`, by the largest remainder. Every count above 0 gets at least 1.

    `total` must not be less than the number of counts above 0. In a tie, the earlier count gets more.
    """
    shares = [0] * len(counts)
    rest = [i for i, count in enumerate(counts) if count]
    # A share below 1 is raised to 1. That leaves less for the others, so they are checked again.
    while small := [i for i in rest if total * counts[i] < sum(counts[j] for j in rest)]:
        for i in small:
            shares[i] = 1
        rest = [i for i in rest if i not in small]
        total -= len(small)
    whole = sum(counts[i] for i in rest)
    for i in rest:
        shares[i] = total * counts[i] // whole
    missing = total - sum(shares[i] for i in rest)
    for i in sorted(rest, key=lambda i: -(total * counts[i] % whole))[:missing]:
        shares[i] += 1
    return shares


def codes(wanted: Sequence[Order], seed: int) -> list[str]:
    """A code in the style of M&Ms, such as A0S9V9, for each order. All codes are different.

    A code depends on the seed and its order alone. But if two codes would be equal, which happens about once in 300
    phantoms of M&Ms' size, the later one is changed.
    """
    letters, digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    found: dict[str, None] = {}
    for order in wanted:
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{seed}:{order.stream}:{attempt}".encode()).digest()
            code = "".join((digits if i % 2 else letters)[b % (10 if i % 2 else 26)] for i, b in enumerate(digest[:6]))
            if code not in found:
                break
            attempt += 1
        found[code] = None
    return list(found)


def _groups(counts: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(vendor, split, count) from a configuration's fields; a count that is absent is 0."""
    training = (("A", LABELLED, "labelled_a"), ("B", LABELLED, "labelled_b"), ("C", UNLABELLED, "unlabelled_c"))
    groups = [(vendor, split, counts.get(name, 0)) for vendor, split, name in training]
    for split, name in ((TESTING, "testing"), (VALIDATION, "validation")):
        groups += [(vendor, split, counts.get(name, 0)) for vendor in VENDORS]
    return groups
