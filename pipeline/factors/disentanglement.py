"""How well are anatomy and modality separated? Numbers to watch while an SDNet trains, so that a collapse is noticed.

Two metrics are after Liu et al. 2020, "Metrics for exposing the biases of content-style disentanglement"
(arXiv:2008.12378): the distance correlation between the factors, and the information over bias of each. A third is the
accuracy with which a linear classifier predicts the vendor from each factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.networks.sdnet import SDNet

Array = npt.NDArray[np.float64]
Names = npt.NDArray[np.str_]
Rows = npt.NDArray[np.bool_]

POOLED = 16  # pixels a side: images and anatomies are pooled to this size before regression and correlation
FOLDS = 5
RIDGE = 1.0  # penalty of the ridge regression on standardised features
FIRES = 1e-3  # a channel that is 1 in a smaller share of pixels counts as dead
COLLAPSED_SPREAD, UNUSED_SWAP = 0.01, 0.01  # if smaller: all codes are alike; an image ignores its code


@dataclass(frozen=True)
class WatchedSlices:
    """Slices of several vendors: image (N, 1, S, S) float32 in [-1, 1], and each slice's vendor and subject (N,)."""

    image: Tensor
    vendor: Names
    subject: Names


@dataclass(frozen=True)
class Factors:
    """An SDNet's output for some slices. Tensors are float32 on the CPU.

    Images are (N, 1, S, S) in [-1, 1], anatomies (N, C, S, S) of 0 and 1, modalities (N, M). `swapped` is drawn with
    the modality of slice `donor` (N,). `modality_again` and `anatomy_again` are encoded from `swapped`.
    """

    image: Tensor
    anatomy: Tensor
    modality: Tensor
    reconstruction: Tensor
    swapped: Tensor
    donor: npt.NDArray[np.int64]
    modality_again: Tensor
    anatomy_again: Tensor


def watch(model: SDNet, slices: WatchedSlices, chunk: int = 16) -> dict[str, float]:
    """Measure all numbers, by name. The model's train or eval mode is restored; `chunk` slices are encoded at a time.

    - `reconstruction`: L1 distance to the image, whose range is [-1, 1].
    - `dead_channels`: number of channels that are 1 in less than 0.1 % of the pixels.
    - `anatomy_share`: share of the pixels in which some channel is 1.
    - `code_spread`: standard deviation of the codes, mean over dimensions; the prior has 1. The codes are not yet
      standardised (see `TrainConfig.standardise_codes`).
    - `swap_change`: mean absolute change of the image when it is drawn with another vendor's modality.
    - `swap_error`: L1 distance between that modality and the one encoded from the swapped image, over `code_spread`.
    - `swap_anatomy`: share of the pixels whose anatomy differs in the swapped image.
    - `distance_correlation`: of anatomy and modality, 0 (independent) to 1.
    - `information_modality`, `information_anatomy`: see `information_over_bias`.
    - `vendor_modality`, `vendor_anatomy`: see `vendor_probe`; absent if the probe returns None.
    """
    training = model.training
    model.eval()
    with torch.inference_mode():
        found = _factors(model, slices, chunk)
    model.train(training)
    images, anatomy = _pooled(found.image), _pooled(found.anatomy)
    codes = found.modality.double().cpu().numpy()
    spread = float(codes.std(axis=0).mean())
    usage = found.anatomy.mean(dim=(0, 2, 3))
    again = (found.modality_again - found.modality[torch.from_numpy(found.donor)]).abs().mean()
    moved = (found.anatomy_again != found.anatomy).any(dim=1).float().mean()
    shares = found.anatomy.mean(dim=(2, 3)).double().cpu().numpy()
    out = {
        "reconstruction": float((found.reconstruction - found.image).abs().mean()),
        "dead_channels": float((usage < FIRES).sum()),
        "anatomy_share": float(usage.sum()),
        "code_spread": spread,
        "swap_change": float((found.swapped - found.reconstruction).abs().mean()),
        "swap_error": float(again) / max(spread, 1e-6),
        "swap_anatomy": float(moved),
        "distance_correlation": distance_correlation(anatomy, codes),
        "information_modality": information_over_bias(codes, images, slices.subject),
        "information_anatomy": information_over_bias(anatomy, images, slices.subject),
    }
    for name, features in (("modality", codes), ("anatomy", shares)):
        score = vendor_probe(features, slices.vendor, slices.subject)
        out |= {} if score is None else {f"vendor_{name}": score}
    return out


def warnings(numbers: dict[str, float], channels: int, train: str = "train", loss: str = "loss") -> list[str]:
    """One line for each collapse that the numbers of `watch` show, with a remedy; empty if there is none.

    `channels` is the number of anatomy channels. `train` and `loss` name the sections of the configuration to change.
    """
    found = []
    if numbers["dead_channels"] >= channels:
        found.append(f"the anatomy is all zero: raise sdnet.anatomy_gain or lower {train}.learning_rate")
    elif channels - numbers["dead_channels"] == 1 and numbers["anatomy_share"] > 0.99:
        found.append(f"the anatomy is one channel everywhere: raise {loss}.balance or lower {train}.learning_rate")
    if numbers["code_spread"] < COLLAPSED_SPREAD:
        found.append(f"the modality codes hardly differ (spread {numbers['code_spread']:.3f}): raise {loss}.kl")
    if numbers["swap_change"] < UNUSED_SWAP:
        change = f"{numbers['swap_change']:.3f}"
        found.append(f"the modality hardly changes the image ({change}): raise {loss}.latent or sdnet.style_width")
    return found


def distance_correlation(x_NP: Array, y_NQ: Array) -> float:
    """Distance correlation of N paired samples, 0 to 1 (Székely et al. 2007). 0 if either side is constant."""
    a, b = (_centred(v) for v in (x_NP, y_NQ))
    scale = np.sqrt((a * a).mean() * (b * b).mean())
    return float(np.sqrt(max((a * b).mean(), 0.0) / scale)) if scale > 0 else 0.0


def information_over_bias(code_NP: Array, image_NQ: Array, subject: Names) -> float:
    """Squared error of the mean image over that of a ridge regression from the code, on held-out subjects.

    1 means that the code predicts the image no better than a constant does; larger is better. The published metric
    trains a network as the decoder. A linear decoder has a closed form, so that it can be computed in every epoch.
    """
    constant, regressed = 0.0, 0.0
    for train, test in _folds(subject):
        mean = image_NQ[train].mean(axis=0)
        x, centre, scale = _standardised(code_NP[train])
        gram = x @ x.T + RIDGE * np.eye(len(x))  # the dual form, since there are fewer slices than features
        weights = x.T @ np.linalg.solve(gram, image_NQ[train] - mean)
        error = image_NQ[test] - mean - ((code_NP[test] - centre) / scale) @ weights
        constant += float(((image_NQ[test] - mean) ** 2).sum())
        regressed += float((error**2).sum())
    return constant / regressed if regressed > 0 else 1.0


def vendor_probe(features_NP: Array, vendor: Names, subject: Names) -> float | None:
    """Balanced accuracy, 0 to 1, of a linear classifier of the vendor on held-out subjects; chance is 1 / vendors.

    Vendors with a single subject are left out. None if fewer than two vendors remain.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score

    enough = [v for v in np.unique(vendor) if len(np.unique(subject[vendor == v])) > 1]
    if len(enough) < 2:
        return None
    kept = np.isin(vendor, enough)
    x, y, who = features_NP[kept], vendor[kept], subject[kept]
    guessed = np.empty_like(y)
    for train, test in _folds(who, y):
        standard, centre, scale = _standardised(x[train])
        classifier = LogisticRegression(max_iter=1000, class_weight="balanced").fit(standard, y[train])
        guessed[test] = classifier.predict((x[test] - centre) / scale)
    return float(recall_score(y, guessed, average="macro"))


def _factors(model: SDNet, slices: WatchedSlices, chunk: int) -> Factors:
    device = next(model.parameters()).device
    donor = _donors(slices.vendor)

    def each(function: object, *inputs: Tensor) -> Tensor:
        parts = [function(*(v[i : i + chunk].to(device) for v in inputs)) for i in range(0, len(donor), chunk)]  # type: ignore[operator]
        return torch.cat(parts).float().cpu()

    image = slices.image
    anatomy, modality = each(model.encode_anatomy, image), each(model.encode_modality, image)
    swapped = each(model.decode, anatomy, modality[torch.from_numpy(donor)])
    return Factors(
        image=image,
        anatomy=anatomy,
        modality=modality,
        reconstruction=each(model.decode, anatomy, modality),
        swapped=swapped,
        donor=donor,
        modality_again=each(model.encode_modality, swapped),
        anatomy_again=each(model.encode_anatomy, swapped),
    )


def _donors(vendor: Names) -> npt.NDArray[np.int64]:
    """For each slice (N,) the number of a slice of another vendor, or of another slice if there is only one vendor.

    The choice is deterministic.
    """
    count = len(vendor)
    out = np.empty(count, dtype=np.int64)
    for i in range(count):
        others = np.flatnonzero(vendor != vendor[i])
        out[i] = others[i % len(others)] if len(others) else (i + 1) % count
    return out


def _pooled(images: Tensor) -> Array:
    """(N, C, S, S) → (N, C · 16 · 16)."""
    pooled: Array = F.adaptive_avg_pool2d(images.float(), POOLED).flatten(1).double().numpy()
    return pooled


def _centred(x_NP: Array) -> Array:
    squares = (x_NP**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * x_NP @ x_NP.T, 0.0))
    np.fill_diagonal(distances, 0.0)
    centred: Array = distances - distances.mean(axis=0) - distances.mean(axis=1)[:, None] + distances.mean()
    return centred


def _standardised(x_NP: Array) -> tuple[Array, Array, Array]:
    centre, scale = x_NP.mean(axis=0), x_NP.std(axis=0) + 1e-8
    return (x_NP - centre) / scale, centre, scale


def _folds(subject: Names, vendor: Names | None = None) -> Iterator[tuple[Rows, Rows]]:
    """Yield (train, test), bool (N,), for 2 to `FOLDS` folds. All slices of a subject are in one fold.

    If vendors are given, the subjects of each vendor are spread evenly over the folds.
    """
    fold_of: dict[str, int] = {}
    groups = vendor if vendor is not None else np.zeros(len(subject), dtype=np.str_)
    for group in np.unique(groups):
        fold_of |= {str(s): i for i, s in enumerate(np.unique(subject[groups == group]))}
    smallest = min(len(np.unique(subject[groups == g])) for g in np.unique(groups))
    count = max(2, min(FOLDS, smallest))
    fold = np.array([fold_of[str(s)] % count for s in subject])
    for k in range(count):
        if (fold == k).any() and (fold != k).any():
            yield fold != k, fold == k
