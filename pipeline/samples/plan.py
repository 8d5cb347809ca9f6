"""The plan: which sample comes next, as a pure function of (seed, stream, index).

A *stream* is an endless sequence of samples over one pool of slices. In every epoch it visits the pool in a new order,
each slice once. A fixed share of its samples is synthesized (FA): the slice gives the anatomy, and a donor gives the
modality. Random numbers come from Philox generators that are keyed by their purpose. So any sample can be computed
alone, in any process and in any order.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.networks.config import Precision
from storage.errors import InputError
from storage.identity import added

PairPolicy = Literal["uniform", "vendor_balanced", "cross_vendor"]
Guard = Literal["none", "intensities", "reencoding"]
JUDGED = ("interpolate", "extrapolate", "gaussian")  # policies whose codes belong to no slice
FaPolicy = Literal["mix", "own", "interpolate", "extrapolate", "gaussian", "styles"]
FaRender = Literal["decode", "residual"]
Regions = Literal["none", "anatomy", "labels", "grey"]
Flips = Literal["none", "rows", "columns", "both"]
Ids = npt.NDArray[np.int64]


class PlanConfig(BaseModel):
    """Settings of resolution augmentation (RA), factor-based augmentation (FA), and the mixture of streams."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    area_range_mm2: tuple[float, float] = Field(
        (0.954, 2.692), description="RA: native pixel areas, uniform in between (paper section 2.1)"
    )
    ra_measure: Literal["area", "length"] = Field(
        "area",
        description="RA: the range is of areas, so that lengths scale by the root; `length` as in the authors' code",
    )
    ra_unlabelled: bool = Field(True, description="RA: unlabelled samples too")
    flips: Flips = Field(
        "none",
        description="what runs backwards in half of the samples, each axis on its own; none by default: a mirrored "
        "heart is not a heart",
    )
    fa_order: Literal["fa_first", "ra_first"] = Field(
        "fa_first",
        description="a sample is drawn on its own grid and then rescaled, or its anatomy is rescaled and then drawn "
        "(authors' code has RA first)",
    )
    fa_anatomy: Literal["any", "labelled"] = Field("any", description="FA: which slices give the anatomy")
    fa_share: float = Field(0.5, ge=0, le=1, description="FA: synthesized share of every batch, replacing real samples")
    fa_policy: FaPolicy = Field(
        "mix",
        description="FA: which modality an anatomy is drawn with. `mix`: a donor's (paper). `own`: its own, so a "
        "reconstruction. `interpolate`: between a donor's and another vendor's donor's. `extrapolate`: a donor's, "
        "moved away from another vendor, along the line between the vendors' means. `gaussian`: drawn from a normal "
        "density of the donor's vendor. `styles`: an imported donor's",
    )
    fa_reach: float = Field(
        1.0, ge=0, description="FA, extrapolate: the most that is added, in distances between the vendors' means"
    )
    fa_guard: Guard = Field(
        "reencoding",
        description="FA, policies whose codes no slice has: an image is kept if its intensities are like the bank's "
        "and, `reencoding`, the SDNet reads the code again from it; else the donor's own code is taken",
    )
    fa_precision: Precision = Field("fp32", description="FA: of the decoder that draws the samples")
    fa_render: FaRender = added(
        "decode",
        description="FA: `decode` draws the whole image, D(a, z') (paper); `residual` adds to the real image what the "
        "code changes, x + D(a, z') - D(a, z), clipped to [-1, 1]: texture, noise and thin walls stay",
    )
    fa_step: tuple[float, float] = added(
        (1.0, 1.0),
        description="FA: the code is z + t (z' - z), t uniform in this range, z the slice's own and z' the policy's; "
        "beyond 1 it lies past the donor",
    )
    fa_regions: Regions = added(
        "none",
        description="FA: regions of `fa_share` of the images get a gain and a shift each: of the anatomy factor's "
        "channels, or, as its controls, of label masks (labelled slices alone) or of eight quantiles of grey",
    )
    turn_degrees: float = added(
        0.0, ge=0, le=180, description="every sample is turned by up to so many degrees, either way, before RA"
    )
    zoom: tuple[float, float] = added(
        (1.0, 1.0),
        description="every sample grows by a linear factor in this range, on top of RA; evenly spread in its logarithm",
    )
    elastic: float = added(
        0.0,
        ge=0,
        le=0.5,
        description="every sample is bent smoothly; no length in it changes by more than this share",
    )
    pairs: PairPolicy = Field("uniform", description="FA: who gives the modality; `uniform` is the paper's")
    unlabelled_ratio: float = Field(1.0, ge=0, description="unlabelled samples for each labelled one in a step")

    @model_validator(mode="after")
    def _areas_ordered(self) -> PlanConfig:
        low, high = self.area_range_mm2
        if not 0 < low <= high:
            raise ValueError(f"area_range_mm2 must be 0 < low <= high, not {low} to {high}")
        if self.fa_step[0] > self.fa_step[1]:
            raise ValueError(f"fa_step must be low <= high, not {self.fa_step[0]} to {self.fa_step[1]}")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom must be 0 < low <= high, not {self.zoom[0]} to {self.zoom[1]}")
        if self.moves and self.fa_order == "ra_first":
            raise ValueError("turn_degrees and elastic move samples before RA; leave fa_order at fa_first")
        return self

    @property
    def moves(self) -> bool:
        """Whether samples are turned or bent, which needs an additional resampling."""
        return self.turn_degrees > 0 or self.elastic > 0

    @property
    def guard(self) -> Guard:
        """The guard that is used for drawn images.

        It is `none` if every code belongs to a slice. Residual images are judged by their intensities alone. For them
        the limits come from real images, from which the bank's codes were read, so the largest accepted re-encoding
        error would be 0.
        """
        if self.fa_policy not in JUDGED and self.fa_step == (1.0, 1.0):
            return "none"
        return "intensities" if self.fa_render == "residual" and self.fa_guard == "reencoding" else self.fa_guard


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A Philox generator that depends on its arguments alone.

    Of `seed`, the lowest 32 bits count. Counters are in [0, 2³²).
    """
    # SeedSequence takes an array in half the time of a list.
    words = np.array([seed & 0xFFFFFFFF, zlib.crc32(purpose.encode()), *counters], dtype=np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class Sample:
    """One planned sample.

    - slice_id: the slice that gives the mask, and the image or the anatomy.
    - donor_id: the donor that gives the modality, or None for a real sample.
    - area: target area of a native pixel in mm², or None to keep the slice's own.
    - flip: whether rows and columns are reversed.
    - other_id, weight: for policies that mix two codes, a donor of another vendor and its weight, 0 to 1.
    - style_id: another slice whose look is borrowed.
    - twin_id: the donor of the sample's twin.
    - seed: for all other random numbers of the sample.
    - step: how far the code moves from the slice's own (0) to the donor's (1); see `PlanConfig.fa_step`.
    - turn: degrees. zoom: a linear factor in addition to RA. bend: seed of the displacement. A twin has the same.
    """

    slice_id: int
    donor_id: int | None
    area: float | None
    flip: tuple[bool, bool] = (False, False)
    other_id: int | None = None
    weight: float = 0.0
    style_id: int | None = None
    twin_id: int | None = None
    seed: int = 0
    step: float = 1.0
    turn: float = 0.0
    zoom: float = 1.0
    bend: int = 0

    def twin(self) -> Sample:
        """The sample's twin: the same anatomy at the same place, drawn with the modality of `twin_id`."""
        return replace(self, donor_id=self.twin_id, other_id=None, weight=0.0, twin_id=None, seed=self.seed + 1)


@dataclass(frozen=True)
class StreamSpec:
    """The pool and the donors of a stream, and how samples are drawn from them.

    - name: keys the stream's random numbers, beside `seed`.
    - pool, pool_vendors: slice ids (n,) and their vendors (n,).
    - donors, donor_vendors: for FA, the donors' numbers (m,) and their vendors (m,).
    - fa_share: 0 to 1. ra_range: native pixel areas in mm², or None for no RA.
    - pairs, flips, policy, turn_degrees, zoom: as in `PlanConfig`. steps: `PlanConfig.fa_step`.
    - own_bank_rows: for the policy `own`, the bank row (n,) of each slice of the pool.
    - style_sources, style_vendors: slice ids whose look samples may borrow. If their vendors are given, a sample
      borrows from another vendor if there is one.
    - twins: every sample gets a twin. bends: samples are bent.
    - seeded: making a sample needs random numbers of its own.
    """

    seed: int
    name: str
    pool: Ids
    fa_share: float = 0.0
    ra_range: tuple[float, float] | None = None
    pairs: PairPolicy = "uniform"
    donors: Ids | None = None
    donor_vendors: npt.NDArray[np.str_] | None = None
    pool_vendors: npt.NDArray[np.str_] | None = None
    flips: Flips = "none"
    policy: FaPolicy = "mix"
    own_bank_rows: Ids | None = None
    style_sources: Ids | None = None
    style_vendors: npt.NDArray[np.str_] | None = None
    twins: bool = False
    steps: tuple[float, float] = (1.0, 1.0)
    seeded: bool = False
    turn_degrees: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    bends: bool = False


class _Lookup:
    """Finds the value of an id. A dictionary of a million ids would take 100 MB."""

    def __init__(self, ids: Ids, values: npt.NDArray[Any]) -> None:
        order = np.argsort(ids, kind="stable")
        self._ids, self._values = ids[order], np.asarray(values)[order]

    def __call__(self, wanted: int) -> Any:
        return self._values[np.searchsorted(self._ids, wanted)]


class Stream:
    """An endless sequence of samples over a pool of slices.

    Raises ValueError if the pool is empty, or if FA (or unseeded twins) has no donors.
    """

    def __init__(self, spec: StreamSpec) -> None:
        if len(spec.pool) == 0:
            raise ValueError(f"stream {spec.name}: its pool of slices is empty")
        if (spec.fa_share > 0 or (spec.twins and not spec.seeded)) and (spec.donors is None or len(spec.donors) == 0):
            raise ValueError(f"stream {spec.name}: FA needs modality donors")
        self.seed, self.name, self.pool = spec.seed, spec.name, np.asarray(spec.pool, dtype=np.int64)
        self.fa_share, self.ra_range, self.pairs = spec.fa_share, spec.ra_range, spec.pairs
        self.policy, self.style_sources, self.twins = spec.policy, spec.style_sources, spec.twins
        self.steps, self.turn_degrees, self.zoom, self.bends = spec.steps, spec.turn_degrees, spec.zoom, spec.bends
        self._style_vendors = spec.style_vendors
        self._is_placed = spec.turn_degrees > 0 or spec.zoom != (1.0, 1.0) or spec.bends
        self._has_rest = spec.seeded or spec.twins or spec.style_sources is not None or spec.steps != (1.0, 1.0)
        self._flips = (spec.flips in ("rows", "both"), spec.flips in ("columns", "both"))
        self.donors = np.asarray(spec.donors if spec.donors is not None else [], dtype=np.int64)
        vendors = np.asarray(spec.donor_vendors if spec.donor_vendors is not None else [""] * len(self.donors))
        self._by_vendor = {str(v): self.donors[vendors == v] for v in np.unique(vendors)}
        pool_vendors = spec.pool_vendors if spec.pool_vendors is not None else np.full(len(self.pool), "")
        self._donor_vendors, self._pool_vendors = vendors, pool_vendors
        self._own_bank_row = _Lookup(self.pool, spec.own_bank_rows) if spec.own_bank_rows is not None else None
        # keeps the order of four epochs, since samples are mostly requested in order
        self._order = lru_cache(maxsize=4)(self._shuffled)

    @cached_property
    def _vendor_of_donor(self) -> _Lookup:
        return _Lookup(self.donors, self._donor_vendors)

    @cached_property
    def _vendor_of_slice(self) -> _Lookup:
        return _Lookup(self.pool, self._pool_vendors)

    def _shuffled(self, epoch: int) -> Ids:
        return generator(self.seed, f"{self.name}/order", epoch).permutation(self.pool)

    def __call__(self, index: int) -> Sample:
        """The sample at `index` ≥ 0."""
        epoch, position = divmod(index, len(self.pool))
        slice_id = int(self._order(epoch)[position])
        rng = generator(self.seed, f"{self.name}/sample", index >> 32, index & 0xFFFFFFFF)
        # Drawn in a fixed order, so that RA's areas are the same with and without FA.
        place, vendor_place, area_place = rng.random(3)
        # Evenly spread, so that every batch has its share to within one sample.
        is_fa = int((index + 1) * self.fa_share) > int(index * self.fa_share)
        donor = self._donor(slice_id, place, vendor_place) if is_fa else None
        area = None
        if self.ra_range is not None:
            low, high = self.ra_range
            area = low + (high - low) * float(area_place)
        flip = (False, False)
        if any(self._flips):
            rows, columns = rng.random(2) < 0.5
            flip = (bool(rows) and self._flips[0], bool(columns) and self._flips[1])
        return self._placed(self._with_rest(Sample(slice_id, donor, area, flip), index), index)

    def _placed(self, sample: Sample, index: int) -> Sample:
        """Add turn, zoom and bend to a sample. They have their own generator, so that they do not change the looks."""
        if not self._is_placed:
            return sample
        rng = generator(self.seed, f"{self.name}/place", index >> 32, index & 0xFFFFFFFF)
        turn, zoom = rng.random(2)
        low, high = np.log(self.zoom)
        bend = int(rng.integers(0, 2**62)) if self.bends else 0
        turn, zoom = self.turn_degrees * (2.0 * float(turn) - 1.0), float(np.exp(low + (high - low) * zoom))
        return replace(sample, turn=turn, zoom=zoom, bend=bend)

    def _with_rest(self, sample: Sample, index: int) -> Sample:
        """Add what only some policies and augmentations need. It has its own generator."""
        two = sample.donor_id is not None and self.policy in ("interpolate", "extrapolate")
        if not two and self.policy != "gaussian" and not self._has_rest:
            return sample
        rng = generator(self.seed, f"{self.name}/rest", index >> 32, index & 0xFFFFFFFF)
        weight, vendor_place, place, look, twin_vendor, twin_place = rng.random(6)
        other = None
        if two and sample.donor_id is not None:
            mine = str(self._vendor_of_donor(sample.donor_id))
            vendors = [v for v in self._by_vendor if v != mine] or [mine]
            others = self._by_vendor[vendors[int(vendor_place * len(vendors))]]
            other = int(others[int(place * len(others))])
        styles = self._styles(sample.slice_id)
        style = None if styles is None else int(styles[int(look * len(styles))])
        seed = int(rng.integers(0, 2**62))
        twin = (
            self._donor(sample.slice_id, float(twin_place), float(twin_vendor))
            if self.twins and len(self.donors)
            else None
        )
        weight = float(weight) if two else 0.0
        low, high = self.steps
        step = low + (high - low) * float(rng.random()) if low < high else low
        return replace(sample, other_id=other, weight=weight, style_id=style, seed=seed, twin_id=twin, step=step)

    def _styles(self, slice_id: int) -> Ids | None:
        """The slices whose look this slice may borrow, or None."""
        if self.style_sources is None or self._style_vendors is None:
            return self.style_sources
        others = self.style_sources[self._style_vendors != self._vendor_of_slice(slice_id)]
        return others if len(others) else self.style_sources

    def _donor(self, slice_id: int, place: float, vendor_place: float) -> int:
        if self.policy == "own":
            assert self._own_bank_row is not None
            return int(self._own_bank_row(slice_id))
        if self.pairs == "uniform":
            candidates = self.donors
        else:
            vendors = list(self._by_vendor)
            if self.pairs == "cross_vendor":
                # if there is only one vendor, its own donors are used
                vendors = [v for v in vendors if v != self._vendor_of_slice(slice_id)] or vendors
            candidates = self._by_vendor[vendors[int(vendor_place * len(vendors))]]
        return int(candidates[int(place * len(candidates))])


def require_even_shares(labelled: int, unlabelled: int, workers: int, batch_size: str = "train.batch_size") -> None:
    """Raises InputError, naming the setting `batch_size`, unless `workers` share a step's samples evenly."""
    if labelled % workers or unlabelled % workers:
        raise InputError(
            "resources.train_workers",
            f"{workers} workers cannot share {labelled} labelled and {unlabelled} unlabelled samples evenly",
            f"choose {batch_size} and plan.unlabelled_ratio as multiples",
        )


@dataclass(frozen=True)
class StepPlan:
    """The composition of a training step: first samples from the stream `labelled`, then samples from `unlabelled`.

    With several workers, each `rank` of `world` takes a contiguous part of both. The parts have the same size, and
    together they are the whole step. Methods raise InputError if `world` does not divide both counts.
    """

    labelled: Stream
    unlabelled: Stream | None
    labelled_per_step: int
    unlabelled_per_step: int

    def samples(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[Sample, bool]]:
        """The samples of a step for one worker, in order, each with whether its mask may be used."""
        labelled, unlabelled = self._parts(rank, world)
        out = [(self.labelled(step * self.labelled_per_step + k), True) for k in labelled]
        if self.unlabelled is not None:
            out += [(self.unlabelled(step * self.unlabelled_per_step + k), False) for k in unlabelled]
        return out

    def rows(self, rank: int = 0, world: int = 1) -> int:
        """The number of samples of a step for one worker."""
        return sum(map(len, self._parts(rank, world)))

    def _parts(self, rank: int, world: int) -> tuple[range, range]:
        """The labelled and the unlabelled samples of a step that a worker takes, as ranges within the step."""
        n, m = self.labelled_per_step, self.unlabelled_per_step if self.unlabelled is not None else 0
        require_even_shares(n, m, world)
        n, m = n // world, m // world
        return range(n * rank, n * (rank + 1)), range(m * rank, m * (rank + 1))
