"""Check whether an image drawn with a modality that no slice has still looks like an image of the bank.

Two things are compared with images of the bank's own slices and codes: whether the intensities are in the same range,
and whether the modality encoder finds the code again in the image (the re-encoding error).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
Code = npt.NDArray[np.float32]
Draw = Callable[[int, Code], Image]  # a bank row and a code (M,) → image (h, w)
Encode = Callable[[Image], Code]

LOOKED_AT = 48  # rows of the bank that set the limits, evenly spread
SLACK = 0.25  # tolerance beyond each statistic's range, as a share of the range
QUANTILES = (0.05, 0.5, 0.95)
ERRORS = 1.5  # largest accepted re-encoding error, over the largest in the bank


class Realism:
    """The guard. Its limits come from up to `LOOKED_AT` of the given rows (n,) of a bank with codes (D, M).

    If `encode` is None, only intensities are compared.
    """

    def __init__(self, rows_n: npt.NDArray[np.integer[Any]], codes_DM: Code, draw: Draw, encode: Encode | None) -> None:
        count = len(rows_n)
        evenly = np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int)
        rows = rows_n[np.unique(evenly)].tolist()
        images = [draw(row, codes_DM[row]) for row in rows]
        seen = np.array([_statistics(image) for image in images])
        slack = SLACK * (seen.max(axis=0) - seen.min(axis=0))
        self.low, self.high = seen.min(axis=0) - slack, seen.max(axis=0) + slack
        self._encode, self._spread = encode, np.maximum(codes_DM.std(axis=0), 1e-6)
        self.most = ERRORS * max(self._errors(images, [codes_DM[row] for row in rows]), default=np.inf)

    def __call__(self, image_HW: Image, code_M: Code) -> bool:
        """Whether an image (h, w) in [-1, 1], drawn with this code, is within the limits."""
        found = _statistics(image_HW)
        inside = bool(((found >= self.low) & (found <= self.high)).all())
        return inside and all(error <= self.most for error in self._errors([image_HW], [code_M]))

    def _errors(self, images: Sequence[Image], codes: Sequence[Code]) -> list[float]:
        """For each image, the mean distance between its code and the encoded one, in spreads of the bank's codes."""
        if self._encode is None:
            return []
        pairs = zip(images, codes, strict=True)
        return [float((np.abs(self._encode(image) - code) / self._spread).mean()) for image, code in pairs]


def _statistics(image_HW: Image) -> npt.NDArray[np.float64]:
    """Mean, standard deviation and three quantiles of the intensities: (5,) float64."""
    return np.array([image_HW.mean(), image_HW.std(), *np.quantile(image_HW, QUANTILES)], dtype=np.float64)
