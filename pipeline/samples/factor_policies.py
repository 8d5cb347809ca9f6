"""The modality vector of a planned sample: the donor's, or one made from several (`PlanConfig.fa_policy`).

`mix` is the paper's policy. The others answer questions that the paper leaves open: whether factors beyond those seen
help, and, with `own`, whether mixing helps or only training on reconstructions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.samples.plan import FaPolicy, Sample

Vectors = npt.NDArray[np.float32]
RIDGE = 1e-6  # added to a vendor's covariance, which is singular if there are few slices


class Modalities:
    """The modality vectors of planned samples. The donors have `modality` (D, M) float32 and `vendor` (D,).

    `reach` is `PlanConfig.fa_reach`.
    """

    def __init__(self, modality: Vectors, vendor: npt.NDArray[np.str_], policy: FaPolicy, reach: float) -> None:
        self.policy, self.reach, self._modality, self._vendor = policy, reach, modality, vendor
        own = {str(v): modality[vendor == v].astype(np.float64) for v in np.unique(vendor)}
        self._mean = {v: rows.mean(axis=0) for v, rows in own.items()}
        self._root = {v: _root(rows) for v, rows in own.items()} if policy == "gaussian" else {}

    def __call__(self, sample: Sample) -> Vectors:
        """The vector (M,) float32 of a sample that has a donor. It depends on the sample and the donors alone."""
        assert sample.donor_id is not None
        donor: Vectors = self._modality[sample.donor_id]
        if self.policy == "gaussian":
            vendor = str(self._vendor[sample.donor_id])
            noise = np.random.Generator(np.random.Philox(sample.seed)).standard_normal(len(donor))
            drawn: Vectors = (self._mean[vendor] + self._root[vendor] @ noise).astype(np.float32)
            return drawn
        if sample.other_id is None:
            return donor
        if self.policy == "interpolate":
            between: Vectors = donor + np.float32(sample.weight) * (self._modality[sample.other_id] - donor)
            return between
        ours, theirs = (self._mean[str(self._vendor[row])] for row in (sample.donor_id, sample.other_id))
        beyond: Vectors = (donor + self.reach * sample.weight * (ours - theirs)).astype(np.float32)
        return beyond


def _root(rows_NM: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The lower triangular L with L Lᵀ equal to the covariance of the rows. Almost 0 for a single row."""
    size = rows_NM.shape[1]
    apart = rows_NM - rows_NM.mean(axis=0)
    covariance = apart.T @ apart / max(1, len(rows_NM) - 1)
    lower: npt.NDArray[np.float64] = np.linalg.cholesky(covariance + RIDGE * np.eye(size))
    return lower
