"""Which difference can be detected with a number of seeds and subjects, from a run's spread or the usual spread."""

from __future__ import annotations

import math

POWER = 0.8  # share of experiments that detect an existing difference
# Standard deviations of Dice on real patients (docs/evaluation.md, "Power"), for the easier and the harder of two
# directions between vendors: of one arm's mean between seeds, and of the subjects' differences between two arms.
SEED_SDS = (0.01, 0.025)
SUBJECT_SDS = (0.025, 0.1)


def detectable(seeds: int, seed_sd: float, subjects: int, subject_sd: float, level: float) -> float:
    """The smallest true difference that `statistics.crossed_interval` detects at `level` in 80 % of experiments.

    `seed_sd` is the standard deviation of the seeds' mean differences (over all subjects), `subject_sd` that of the
    subjects' mean differences (over all seeds). NaN for fewer than two seeds or subjects. The result is an
    approximation and a little too small: it adds each t's quantiles of the level and of the power.
    """
    if min(seeds, subjects) < 2:
        return math.nan
    from scipy.special import stdtrit

    parts = ((seeds, seed_sd), (subjects, subject_sd))
    needed = [(stdtrit(n - 1, 1 - level / 2) + stdtrit(n - 1, POWER)) * sd / math.sqrt(n) for n, sd in parts]
    return math.hypot(*needed)


def usually_detectable(
    seeds: int, subjects: int, level: float, subject_sds: tuple[float, float] = SUBJECT_SDS
) -> tuple[float, float]:
    """`detectable` for the smaller and for the larger of the usual spreads.

    The seeds of two arms are assumed independent, so the spread of their difference is √2 times that of one arm.
    """
    spreads = zip(SEED_SDS, subject_sds, strict=True)
    low, high = (detectable(seeds, math.sqrt(2) * seed, subjects, subject, level) for seed, subject in spreads)
    return low, high
