"""What can be said about a number of subjects: intervals, paired tests, and both corrected for how often one asks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
FEWEST = 6  # subjects: with five, all of one sign, the exact two-sided Wilcoxon test gives p = .0625


def bootstrap_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean of `(N,)` values, one a subject; NaN where N < 2.

    2000 resamples drawn by Philox with seed 0: the same interval each time.
    """
    if len(values) < 2:
        return np.nan, np.nan
    from scipy.stats import bootstrap

    generator = np.random.Generator(np.random.Philox(0))
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=generator)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_test(differences: npt.NDArray[np.float64]) -> float:
    """Two-sided p of the Wilcoxon signed-rank test on `(N,)` paired differences (scipy, exact for small N).

    Zeros are left out, as Wilcoxon did; if all are zero, p is 1. NaN where N < `FEWEST`: such a test can never reach
    .05.
    """
    if len(differences) < FEWEST:
        return np.nan
    if not np.any(differences):
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scand. J. Statist. 1979) of p-values, in their order; NaN counts as no test."""
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return [float(value) for value in adjusted]


def crossed_interval(differences_SN: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval over seeds and over subjects: (mean, low, high).

    Each array is (S seeds, N subjects) of one experiment, such as one direction between two vendors; of several, their
    mean is meant. Seeds and subjects are crossed random effects: the seeds' means and the subjects' means each give the
    mean a variance, to which Student's t belongs with the freedom of each. The half widths add up by their squares, and
    what is left over counts in both, so that the interval is rather too wide than too narrow. From one seed it is over
    subjects alone. NaN limits for fewer than two subjects.
    """
    from scipy.stats import t

    mean = float(np.mean([d.mean() for d in differences_SN]))
    if any(d.shape[1] < 2 for d in differences_SN):
        return mean, np.nan, np.nan
    square = 0.0
    for axis in (1, 0):
        means = [d.mean(axis=axis) for d in differences_SN]
        freedom = sum(len(m) - 1 for m in means)
        if freedom and all(len(m) > 1 for m in means):
            variance = sum(m.var(ddof=1) / len(m) for m in means) / len(means) ** 2
            square += float(t.ppf(0.975, freedom)) ** 2 * float(variance)
    half = float(np.sqrt(square))
    return mean, mean - half, mean + half
