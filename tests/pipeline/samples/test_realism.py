from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.samples.realism import Code, Encode, Image, Realism

RNG = np.random.default_rng(0)
TEXTURES = RNG.random((60, 24, 30)).astype(np.float32)
CODES = RNG.normal(size=(60, 2)).astype(np.float32)


def draw(row: int, code: Code) -> Image:
    """A toy scanner: the first number is brightness, the second contrast."""
    out: npt.NDArray[np.float32] = np.tanh(0.2 * code[0] + (1 + 0.2 * code[1]) * (TEXTURES[row] - 0.5))
    return out


def encode(image: Image) -> Code:
    """Reads them back, about."""
    found = np.arctanh(image.clip(-0.999, 0.999))
    return np.array([found.mean() / 0.2, (found.std() / np.sqrt(1 / 12) - 1) / 0.2], dtype=np.float32)


@pytest.mark.parametrize("reader", [encode, None])
def test_what_the_bank_itself_gives_is_accepted_and_what_lies_far_beyond_is_not(reader: Encode | None) -> None:
    judge = Realism(np.arange(60), CODES, draw, reader)
    assert np.mean([judge(draw(k, CODES[k]), CODES[k]) for k in range(60)]) > 0.9
    mixed = [judge(draw(k, CODES[59 - k]), CODES[59 - k]) for k in range(60)]
    assert np.mean(mixed) > 0.8
    far = np.array([12.0, 0.0], dtype=np.float32)
    assert not any(judge(draw(k, far), far) for k in range(60))


def test_a_code_that_the_image_does_not_show_is_rejected_only_by_reading_it_again() -> None:
    other = np.array([0.3, 6.0], dtype=np.float32)  # what the image is said to be drawn with, and is not
    image = draw(3, CODES[3])
    assert Realism(np.arange(60), CODES, draw, None)(image, other)
    assert not Realism(np.arange(60), CODES, draw, encode)(image, other)
