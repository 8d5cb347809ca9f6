"""What difference so many seeds and subjects can show: of a run's own spread, or of the usual one before there is a
run."""

from __future__ import annotations

import math

POWER = 0.8  # share of experiments that are to tell a difference that is there
# Standard deviations on real patients (docs/evaluation.md, "Power"): of one arm's mean Dice between seeds, and of the
# subjects' differences between two arms. From the easier of two directions between vendors to the harder one.
SEED_SDS = (0.01, 0.025)
SUBJECT_SDS = (0.025, 0.1)


def detectable(seeds: int, seed_sd: float, subjects: int, subject_sd: float, level: float) -> float:
    """The smallest true difference that `statistics.crossed_interval` tells from zero at `level` in `POWER` of
    experiments.

    `seed_sd` is the standard deviation of the seeds' mean differences (over all subjects), `subject_sd` that of the
    subjects' (over all seeds). NaN for fewer than two of either. An approximation, a little too small: each t's
    quantile at the level plus that of the power.
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
    """`detectable` with the smaller and with the larger of the usual spreads.

    Two arms' seeds are taken as independent, so that their difference moves by √2 of what one arm does.
    """
    spreads = zip(SEED_SDS, subject_sds, strict=True)
    low, high = (detectable(seeds, math.sqrt(2) * seed, subjects, subject, level) for seed, subject in spreads)
    return low, high
