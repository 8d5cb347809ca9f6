"""Intervals and tests over subjects and seeds, and the correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


class Crossed(NamedTuple):
    """A mean difference, its 95 % interval over seeds and subjects, and the two-sided p for no difference."""

    mean: Floats
    low: Floats
    high: Floats
    p: Floats


def bootstrap_interval(values: Floats) -> tuple[float, float]:
    """95 % percentile bootstrap interval (low, high) of the mean of (N,) values, one a subject. NaN if N < 2.

    It has 2000 resamples, drawn by Philox with seed 0, so that the interval is always the same. It covers the variation
    of subjects, not of seeds. So use it for one arm's Dice, not for a difference between arms.
    """
    if len(values) < 2:
        return np.nan, np.nan
    from scipy.stats import bootstrap

    generator = np.random.Generator(np.random.Philox(0))
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=generator)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(p_values: npt.ArrayLike, weights: npt.ArrayLike = 1.0) -> Floats:
    """Holm's step-down adjustment (Scand. J. Statist. 1979) of (..., M) p-values along the last axis.

    `weights` are positive and have the same shape or broadcast to it. A hypothesis with a larger weight gets more of
    the level (Holm's section 4). NaN counts as no test and stays NaN.
    """
    p = np.asarray(p_values, dtype=np.float64)
    weight = np.broadcast_to(np.asarray(weights, dtype=np.float64), p.shape)
    untested = np.isnan(p)
    weight = np.where(untested, 0.0, weight)
    scaled = np.divide(p, weight, out=np.full(p.shape, np.finfo(np.float64).max), where=~untested)
    order = np.argsort(scaled, axis=-1, kind="stable")
    ordered = np.take_along_axis(weight, order, axis=-1)
    left = np.flip(np.cumsum(np.flip(ordered, axis=-1), axis=-1), axis=-1)  # weight of this hypothesis and later ones
    stepped = np.maximum.accumulate(np.take_along_axis(scaled, order, axis=-1) * left, axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(1.0, stepped), axis=-1)
    return np.where(untested, np.nan, adjusted)


def crossed_interval(differences_SN: Sequence[Floats]) -> Crossed:
    """Mean of paired differences, with its 95 % interval and p over seeds and subjects.

    Each array is (..., S seeds, N subjects) of one experiment, such as one direction between two vendors. Of several
    experiments, the mean is taken. Leading axes are separate cases; the result has these axes.

    Seeds and subjects are crossed random effects. The seeds' means give the overall mean one variance, the subjects'
    means another, each with Student's t of its own degrees of freedom. The two half widths are added in squares. For
    normal effects and one experiment such an interval is never too narrow, at any level (Banerjee, Sankhyā 1960). Of
    several experiments, whose variances may differ, the degrees of freedom are Welch and Satterthwaite's; then it is
    close to its level. The residual variance counts in both parts. `p` is the level at which the interval just reaches
    zero, so `holm` can correct it.

    If an experiment has a single seed, interval and p cover subjects alone. They are NaN for fewer than two subjects.
    """
    from scipy.special import stdtrit

    mean = np.mean([d.mean(axis=(-2, -1)) for d in differences_SN], axis=0)
    if any(d.shape[-1] < 2 for d in differences_SN):
        nothing = np.full_like(mean, np.nan)
        return Crossed(mean, nothing, nothing, nothing)
    parts = _variances(differences_SN)
    half = np.sqrt(np.sum([stdtrit(freedom, 0.975) ** 2 * variance for freedom, variance in parts], axis=0))
    return Crossed(mean, mean - half, mean + half, _level_reaching_zero(np.abs(mean), parts))


def _variances(differences_SN: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    """(degrees of freedom, variance of the mean) for seeds and for subjects, if there are at least two of them."""
    parts = []
    for axis in (-2, -1):
        means = [d.mean(axis=axis) for d in differences_SN]
        if all(m.shape[-1] > 1 for m in means):
            variances = [m.var(axis=-1, ddof=1) / m.shape[-1] for m in means]
            total = np.sum(variances, axis=0)
            squares = np.sum([v**2 / (m.shape[-1] - 1) for v, m in zip(variances, means, strict=True)], axis=0)
            fewest = np.full_like(total, min(m.shape[-1] for m in means) - 1)
            freedom = np.divide(total**2, squares, out=fewest, where=squares > 0)
            parts.append((freedom, total / len(means) ** 2))
    return parts


def _level_reaching_zero(size: Floats, parts: Sequence[tuple[Floats, Floats]]) -> Floats:
    """The level at which the interval reaches zero.

    It lies between the p values that each part's t gives for the total variance, and is found by bisection.
    """
    from scipy.special import stdtr, stdtrit

    total = np.sum([variance for _, variance in parts], axis=0)
    ratio = np.divide(size, np.sqrt(total), out=np.zeros_like(size), where=total > 0)
    tails = np.log(np.maximum([stdtr(freedom, -ratio) for freedom, _ in parts], 1e-300))
    low, high = tails.min(axis=0), tails.max(axis=0)
    for _ in range(20 if len(parts) > 1 else 0):
        middle = (low + high) / 2
        square = np.sum([stdtrit(freedom, np.exp(middle)) ** 2 * variance for freedom, variance in parts], axis=0)
        low, high = np.where(square > size**2, middle, low), np.where(square > size**2, high, middle)
    certain = np.where(size > 0, 0.0, 1.0)  # p if all differences are the same number
    return np.where(total > 0, np.minimum(1.0, 2 * np.exp((low + high) / 2)), certain)
