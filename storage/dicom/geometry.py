"""Where an image lies: position and directions in the patient's coordinates (to the left, to the back, to the head)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from storage.dicom.read import Plane

Floats = npt.NDArray[np.float64]


def position(plane: Plane) -> Floats:
    """The centre of the first pixel in mm, (3,)."""
    return np.array(plane.position)


def directions(plane: Plane) -> Floats:
    """Unit vectors (2, 3) along a row and along a column."""
    return np.array(plane.orientation).reshape(2, 3)


def normal(plane: Plane) -> Floats:
    """The image's unit normal, (3,): the cross product of the directions along a row and along a column."""
    normal = np.cross(*directions(plane))
    unit: Floats = normal / np.linalg.norm(normal)
    return unit


def depth(plane: Plane) -> float:
    """Where the image lies along its normal, in mm."""
    return float(normal(plane) @ position(plane))
