"""Export a trained network's segmentation path as an ONNX file, to run it without torch.

The input is `image` (N, 1, S, S) float32 in [-1, 1], with any N. The output is `logits` (N, classes, S, S). An SDNet's
path is anatomy encoder, rounding and segmentor; its second output is the rounded `anatomy` (N, channels, S, S). If a
channel's share of a pixel is one half up to rounding error, two runtimes may round it differently, and their logits
then differ near that pixel. So the runtimes' logits are compared away from such pixels, and the pixels are counted.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.networks.files import load_model
from pipeline.networks.folding import folded
from pipeline.networks.sdnet import SDNet
from storage import fs
from storage.errors import InputError, StageError

OPSET = 18
TOLERANCE = 1e-4  # largest accepted difference of the logits
REACH = 2  # pixels: how far one anatomy pixel influences the segmentor's output (two 3 × 3 convolutions)
MOST_TURNED = 1e-4  # share of anatomy pixels that may be rounded differently


@dataclass(frozen=True)
class Check:
    """ONNX Runtime compared with torch.

    largest_difference: of the logits, more than `REACH` pixels away from pixels with different anatomies. turned: the
    number of pixels with different anatomies. pixels: the number of all pixels.
    """

    largest_difference: float
    turned: int
    pixels: int


class _Path(nn.Module):
    """Image → logits, and for an SDNet the anatomy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        if not isinstance(self.network, SDNet):
            return self.network(image)
        anatomy = self.network.encode_anatomy(image)
        return self.network.segment(anatomy), anatomy


def export_onnx(folder: str, target: str) -> Check:
    """Write the network in `folder` as ONNX to `target`, after a check that ONNX Runtime computes the same as torch.

    Batch-norms are folded into their convolutions. The file's metadata holds `model.json`. Raises InputError if the
    packages of `cardiomix[onnx]` or the network are absent, and StageError if the two runtimes disagree. Nothing is
    written then.
    """
    _require()
    model, document = load_model(folder)
    size = int(document["preprocess"]["size"])
    path = _Path(model.eval().requires_grad_(False))
    small = _Path(folded(model))
    data = _exported(small, size, isinstance(model, SDNet), {"cardiomix": json.dumps(document, sort_keys=True)})
    check = compare(data, path, _images(size))
    fs.write_bytes(target, data)
    return check


def compare(onnx_bytes: bytes, path: nn.Module, images: npt.NDArray[np.float32]) -> Check:
    """Run both on images (N, 1, S, S) in [-1, 1].

    Raises StageError if the logits differ by more than `TOLERANCE`, or over `MOST_TURNED` of the anatomy pixels differ.
    """
    import onnxruntime
    from scipy.ndimage import binary_dilation

    session = onnxruntime.InferenceSession(onnx_bytes, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": images})
    with torch.inference_mode():
        wanted = path(torch.from_numpy(images))
    wanted = [part.numpy() for part in (wanted if isinstance(wanted, tuple) else (wanted,))]
    turned = np.zeros((len(images), *images.shape[2:]), dtype=bool)
    if len(wanted) > 1:
        turned = (found[1] != wanted[1]).any(1)
    near = binary_dilation(turned, np.ones((1, 2 * REACH + 1, 2 * REACH + 1), dtype=bool)) if turned.any() else turned
    apart = np.abs(found[0] - wanted[0]).max(1)
    check = Check(float(np.where(near, 0.0, apart).max()), int(turned.sum()), turned.size)
    if not check.largest_difference <= TOLERANCE or check.turned > MOST_TURNED * check.pixels:
        raise StageError(
            f"ONNX Runtime and torch disagree: logits by {check.largest_difference:.2g}, {check.turned} of "
            f"{check.pixels} anatomy pixels; nothing was written"
        )
    return check


def _require() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("ONNX", f"no {error.name} here", "pip install 'cardiomix[onnx]'") from None


def _exported(path: nn.Module, size: int, anatomy: bool, metadata: dict[str, str]) -> bytes:
    """The ONNX file's bytes, with the weights inside."""
    names = ["logits", "anatomy"] if anatomy else ["logits"]
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        program = torch.onnx.export(
            path,
            (torch.zeros(2, 1, size, size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.model.producer_name = "cardiomix"
    data: bytes = program.model_proto.SerializeToString()
    return data


def _images(size: int) -> npt.NDArray[np.float32]:
    """Three test images (3, 1, size, size) float32: smooth rings with noise, over the whole range [-1, 1]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    out = []
    for radius in (0.2, 0.35, 0.6):
        ring = np.exp(-(((np.hypot(x, y) - radius) / 0.1) ** 2)) * 2 - 1
        out.append(np.clip(ring + 0.2 * rng.standard_normal(ring.shape), -1, 1))
    return np.stack(out)[:, None].astype(np.float32)
