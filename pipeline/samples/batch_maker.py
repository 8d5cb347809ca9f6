"""Make the samples of a whole step together on one device: FA's decoding and RA's resampling run once for the batch.

The plan, the caches and all random numbers are those of `SampleMaker`. Masks equal its masks to the byte, and images
equal its images within 1e-5. Looks besides FA (such as random curves and regions) are made on the CPU by the same
functions. If a look follows FA, the drawn image is copied to the CPU and back. So is an image that the guard checks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.samples import canvas
from pipeline.samples.maker import TWIN, UPLOADED, SampleMaker, facts_of
from pipeline.samples.plan import Sample
from pipeline.samples.preprocess import WorkingSlice
from pipeline.samples.rescale import Axes, Axis, inside, nearest_together, resample_together
from pipeline.samples.stream_config import StreamConfig
from storage.errors import FinalError

AHEAD = 2  # batches that are ready or in progress while the trainer uses one

Batch = dict[str, Tensor]
T = TypeVar("T")


def batches_ahead(
    config: StreamConfig, steps: range, *, rank: int = 0, world: int = 1, device: str = "cpu", threads: int = 1
) -> Generator[Batch]:
    """Yield the batches of `steps` for one train worker, in order, made on `device` by a thread of this process.

    The samples are those of `actors.streaming.batches`. `threads` becomes torch's number of threads, for the whole
    process. Raises InputError if the workers cannot share a step evenly or the bank is damaged, and FinalError if the
    device's memory runs out.
    """
    left = iter(steps)
    ahead: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="samples") as thread:
        maker = _result(thread.submit(BatchMaker, config, rank, world, device, threads))
        maker.maker.plan.rows(rank, world)  # raises if the workers cannot share a step
        try:
            while True:
                room = range(AHEAD + 1 - len(ahead))
                ahead.extend(thread.submit(maker, step) for _, step in zip(room, left, strict=False))
                if not ahead:
                    return
                batch = _result(ahead.popleft())
                if maker.stream is not None:  # made on the maker's stream, used on the current one
                    for name in UPLOADED:
                        if name in batch:
                            batch[name].record_stream(torch.cuda.current_stream(maker.device))
                yield batch
        finally:
            for future in ahead:
                future.cancel()


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except torch.OutOfMemoryError as error:
        remedy = "pass --set resources.synthesis=actors, or lower train.batch_size"
        raise FinalError(f"samples: the device of the training has no memory left to make them; {remedy}") from error


@dataclass(frozen=True)
class _Source:
    """A sample before FA and RA.

    image: the real image (h, w), or None if it is not needed. mask: (h, w). area: of a pixel, in mm². labelled: whether
    the mask may be used.
    """

    sample: Sample
    image: npt.NDArray[np.float32] | None
    mask: npt.NDArray[np.uint8]
    area: float
    labelled: bool


class BatchMaker:
    """Makes the samples of a step on a device. Its `SampleMaker` reads and plans."""

    def __init__(
        self, config: StreamConfig, rank: int = 0, world: int = 1, device: str = "cpu", threads: int = 1
    ) -> None:
        self.device = torch.device(device)
        self.maker = SampleMaker(config, rank, world, threads, device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._size, self._ra_first = config.preprocess.size, config.plan.fa_order == "ra_first"
        self._residual = config.plan.fa_render == "residual"

    def __call__(self, step: int) -> Batch:
        """The step's samples as tensors, with the keys of `SampleMaker.__call__`.

        Images, masks and twins are on the device, all else on the CPU.
        """
        maker = self.maker
        began, rejected = time.perf_counter(), maker.turned_down()
        planned = maker.plan.samples(step, maker.rank, maker.world)
        count, wanted, twin_of = len(planned), list(planned), np.arange(len(planned))
        for k, (sample, labelled) in enumerate(planned):
            if maker.config.twins and not labelled:  # a labelled sample is its own twin
                twin_of[k] = len(wanted)
                wanted.append((sample.twin(), False))
        with torch.cuda.stream(self.stream), torch.no_grad():
            image, mask = self._made([self._source(sample, labelled) for sample, labelled in wanted])
            batch = {"image": image[:count, None], "mask": mask[:count]}
            if maker.config.twins:
                batch[TWIN] = image[canvas.upload(twin_of, self.device)][:, None]
        if self.stream is not None:
            self.stream.synchronize()  # in this thread, so that the trainer does not wait
        facts = facts_of(planned, time.perf_counter() - began, maker.turned_down() - rejected)
        return batch | {name: torch.from_numpy(values) for name, values in facts.items()}

    def _source(self, sample: Sample, labelled: bool) -> _Source:
        drawn = sample.donor_id is not None and not self._ra_first
        if drawn and not self._residual:
            return _Source(sample, None, *self.maker.masks(sample.slice_id), labelled)
        source = self.maker.working(sample.slice_id)
        if not drawn:
            source = self.maker.augmented(source, sample)
        return _Source(sample, source.image, source.mask, source.area, labelled)

    def _made(self, sources: Sequence[_Source]) -> tuple[Tensor, Tensor]:
        """Images (N, S, S) float32 and masks (N, S, S) uint8. The mask of an unlabelled sample is 0."""
        groups = canvas.alike([s.mask.shape for s in sources])
        # drawn samples come first in a group, so that a slice of the tensor holds them
        groups = [sorted(group, key=lambda k: sources[k].sample.donor_id is None) for group in groups]
        images, masks = zip(*(self._group([sources[k] for k in group]) for group in groups), strict=True)
        back = canvas.upload(np.argsort(np.concatenate(groups)), self.device)
        return torch.cat(images)[back], torch.cat(masks)[back]

    def _group(self, sources: Sequence[_Source]) -> tuple[Tensor, Tensor]:
        """As `_made`, for sources that share a canvas. Drawn samples come first."""
        shapes = [s.mask.shape for s in sources]
        size = canvas.largest(shapes)
        image = canvas.on_canvases([s.image for s in sources], size, torch.float32, self.device)
        used = [s.mask if s.labelled else None for s in sources]
        mask = canvas.on_canvases(used, size, torch.uint8, self.device)
        drawn = [s for s in sources if s.sample.donor_id is not None]
        if drawn and not self._ra_first:
            image[: len(drawn)] = self._drawn(drawn, self._anatomy(drawn, size), shapes[: len(drawn)], image)
            if self.maker.augments:
                image[: len(drawn)], mask[: len(drawn)] = self._augmented(drawn, image, size)
        fill = canvas.lowest(image, canvas.inside(shapes, size, self.device))
        rows, columns = (self._axes(sources, axis) for axis in (0, 1))
        made = resample_together(image, rows, columns, fill)
        if drawn and self._ra_first:
            some = slice(len(drawn))
            made[some] = self._drawn_last(drawn, made[some], rows[some], columns[some], fill[some], size)
        return made, nearest_together(mask, rows, columns)

    def _anatomy(self, sources: Sequence[_Source], size: canvas.Shape) -> Tensor:
        anatomies = [self.maker.anatomy(s.sample.slice_id) for s in sources]
        return canvas.on_canvases(anatomies, size, torch.uint8, self.device)

    def _axes(self, sources: Sequence[_Source], axis: int) -> Axes:
        """The resampling of the samples' rows (axis 0) or columns (axis 1)."""
        axes = [
            Axis(s.mask.shape[axis], self._size, self.maker.scale(s.sample, s.area), s.sample.flip[axis])
            for s in sources
        ]
        return Axes.of(axes, self.device)

    def _drawn(
        self, sources: Sequence[_Source], anatomy_NHW: Tensor, shapes: Sequence[canvas.Shape], real_NHW: Tensor
    ) -> Tensor:
        assert self.maker.drawing is not None
        samples = [s.sample for s in sources]
        own = np.stack([self.maker.own_code(sample.slice_id) for sample in samples])
        real = real_NHW[: len(sources)] if self._residual else None
        return self.maker.drawing.together(samples, anatomy_NHW, own, shapes, real)

    def _drawn_last(
        self,
        sources: Sequence[_Source],
        real_NSS: Tensor,
        rows: Axes,
        columns: Axes,
        fill_N: Tensor,
        size: canvas.Shape,
    ) -> Tensor:
        """Draw images from anatomies after these are rescaled (`plan.fa_order=ra_first`): (N, S, S)."""
        anatomy = nearest_together(self._anatomy(sources, size), rows, columns)
        drawn = self._drawn(sources, anatomy, [(self._size, self._size)] * len(sources), real_NSS)
        there = inside(rows, columns)
        outside = fill_N if self._residual else canvas.lowest(drawn, there)
        return drawn.where(there, outside[:, None, None])

    def _augmented(self, sources: Sequence[_Source], image_NHW: Tensor, size: canvas.Shape) -> tuple[Tensor, Tensor]:
        """Drawn images after further looks and moves, and their masks. This runs on the CPU."""
        made = []
        for s, image in zip(sources, image_NHW[: len(sources)].cpu().numpy(), strict=True):
            height, width = s.mask.shape
            drawn = WorkingSlice(np.ascontiguousarray(image[:height, :width]), s.mask, s.area)
            made.append(self.maker.augmented(drawn, s.sample))
        masks = [one.mask if s.labelled else None for one, s in zip(made, sources, strict=True)]
        return (
            canvas.on_canvases([one.image for one in made], size, torch.float32, self.device),
            canvas.on_canvases(masks, size, torch.uint8, self.device),
        )
