"""Faults of data, each made in one subject of a clean folder, with what must be said of it."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

MNMS, ACDC, TABLE = "mnms", "acdc", "table"
EVERY, CINES = (MNMS, ACDC, TABLE), (MNMS, TABLE)
NAMES = {MNMS: ("fine", "poor"), ACDC: ("patient001", "patient002"), TABLE: ("fine", "poor")}
AFFINE = np.diag([1.5, 1.5, 8.0, 1.0])
DAMAGED = "is damaged or cut off: it cannot be read to the end"


@dataclass(frozen=True)
class Study:
    """The subject of a clean data folder that a fault befalls. Of ACDC, `image` and `mask` are ED's own files."""

    data: Path
    layout: str
    name: str
    image: Path
    mask: Path
    table: Path

    def cell(self, column: str, value: str) -> None:
        """Write into the subject's row of the table."""
        with self.table.open(newline="") as file:
            header, *rows = csv.reader(file)
        at = [name.lower() for name in header].index(column.lower())
        for row in rows:
            if self.name in row[:2]:
                row[at] = value
        with self.table.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])


Make = Callable[[Study], object]


@dataclass(frozen=True)
class Fault:
    """`file` is whose name the line gives: "image", "mask", "table" or a name itself."""

    name: str
    make: Make
    reason: str
    remedy: str
    file: str = "image"
    layouts: tuple[str, ...] = EVERY
    options: dict[str, Any] = field(default_factory=dict)


# ---- how faults are made


def content(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a gzip file's content."""
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def patched(block: bytes, **fields: Any) -> bytes:
    header = nib.Nifti1Header(block[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + block[348:]


def head(**fields: Any) -> Make:
    """Header fields of the image, behind nibabel's back."""
    return lambda s: content(s.image, lambda block: patched(block, **fields))


def mask_head(**fields: Any) -> Make:
    return lambda s: content(s.mask, lambda block: patched(block, **fields))


def saved(path: Path, data: npt.NDArray[Any], affine: npt.NDArray[Any] = AFFINE) -> None:
    nib.save(nib.Nifti1Image(data, affine, dtype=data.dtype), path)


def loaded(path: Path) -> npt.NDArray[Any]:
    return np.asarray(nib.load(path).dataobj).copy()


def image(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Make:
    return lambda s: saved(s.image, change(loaded(s.image)))


def mask(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], affine: npt.NDArray[Any] = AFFINE) -> Make:
    return lambda s: saved(s.mask, change(loaded(s.mask)), affine)


def moved(along: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """The clean affine, its origin shifted by this many mm."""
    affine = AFFINE.copy()
    affine[:3, 3] = along
    return affine


def voxel(value: float, dtype: type = np.float32) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """One voxel of the first slice."""

    def change(data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        out = data.astype(dtype)
        out[(0,) * out.ndim] = value
        return out

    return change


def labels(*new: int) -> Make:
    """Background, LV, MYO, RV (of ACDC: background, RV, MYO, LV) become these values."""
    return mask(lambda data: np.array(new, np.uint8)[data])


def raw(change: Callable[[bytes], bytes], which: str = "image") -> Make:
    """The file's bytes as they lie on disk."""

    def make(s: Study) -> None:
        path: Path = getattr(s, which)
        path.write_bytes(change(path.read_bytes()))

    return make


def unzipped(make: Make) -> Make:
    """The fault in a file that is not compressed, whatever its name says."""

    def both(s: Study) -> None:
        make(s)
        s.image.write_bytes(gzip.decompress(s.image.read_bytes()))

    return both


def in_place_of(which: str, put: Callable[[Path], object]) -> Make:
    """Something else under the file's name."""

    def make(s: Study) -> None:
        path: Path = getattr(s, which)
        path.unlink()
        put(path)

    return make


def moved_out(s: Study) -> None:
    """A link to the image, which now lies beside the data folder."""
    s.image.rename(s.data.parent / "elsewhere.nii.gz")
    s.image.symlink_to(s.data.parent / "elsewhere.nii.gz")


def cell(column: str, value: str) -> Make:
    return lambda s: s.cell(column, value)


def info(text: str) -> Make:
    return lambda s: s.table.write_text(text)


def copy_of_fine(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda data: data) -> Make:
    def make(s: Study) -> None:
        fine = NAMES[s.layout][0]
        other = Path(str(s.image).replace(s.name, fine))
        saved(s.image, change(loaded(other)))

    return make


def rows_twice(s: Study) -> None:
    lines = s.table.read_text().splitlines(keepends=True)
    s.table.write_text("".join([*lines, lines[-1]]))


COPY, EXPORT, MEND = "copy the file again", "export", "header"
GRID = "resample the mask onto the grid"
CODING = "write 0 for background and 1, 2, 3"
ORDER = "give a column labels, "
OPENED = "check that it is a file and its permissions"
MISSING = "copy it from the data set"
PHASES = "correct ED and ES"
NUMBER = "is a frame number: 0, 1, 2"
OUTSIDE = "copy the file into the folder, write a relative path"

FAULTS = [
    # the image's header
    Fault("zero voxel size", head(pixdim=[1, 0, 0, 8, 0, 0, 0, 0]), "voxel size is 0 × 0 × 8 mm", "column spacing"),
    Fault("nan voxel size", head(pixdim=[1, np.nan, 1, 8, 0, 0, 0, 0]), "voxel size is nan × 1 × 8 mm", MEND),
    Fault("infinite voxel size", head(pixdim=[1, 1, np.inf, 8, 0, 0, 0, 0]), "voxel size is 1 × inf × 8 mm", MEND),
    Fault("huge voxel size", head(pixdim=[1, 1, 1, 1e9, 0, 0, 0, 0]), r"voxel size is 1 × 1 × 1e\+09 mm", MEND),
    Fault("metres that are not", head(xyzt_units=1), "voxel size is 1500 × 1500 × 8000 mm", MEND),
    Fault("negative axis", head(dim=[3, 24, -20, 3, 1, 1, 1, 1]), "header claims 24 × -20 × 3 voxels", "mend the head"),
    Fault("empty axis", head(dim=[3, 24, 0, 3, 1, 1, 1, 1]), "header claims 24 × 0 × 3 voxels", "mend the header"),
    Fault("10^12 voxels", head(dim=[3, 10000, 10000, 10000, 1, 1, 1, 1]), "more than a study has", COPY),
    Fault("10^12 voxels, raw", unzipped(head(dim=[3, 10000, 10000, 10000, 1, 1, 1, 1])), "more than a study has", COPY),
    Fault("more than fits", head(dim=[4, 512, 512, 500, 900, 1, 1, 1]), "more than the file can hold", COPY),
    Fault("more than fits, raw", unzipped(head(dim=[3, 240, 20, 3, 1, 1, 1, 1])), "more than the file can hold", COPY),
    Fault("frames that are not there", head(dim=[4, 24, 20, 3, 8, 1, 1, 1]), DAMAGED, COPY, layouts=CINES),
    Fault("two axes", image(lambda a: a[:, :, 0, ...].reshape(24, -1)), "has 2 axes where 3", "x, y, slice"),
    Fault("five axes", image(lambda a: a.reshape(24, 20, 3, 1, -1)), "has 5 axes where 3", "x, y, slice"),
    Fault("complex numbers", image(lambda a: a.astype(np.complex64)), "colours or complex numbers", "grey values"),
    Fault("colours", head(datatype=128, bitpix=24), "colours or complex numbers", "grey values"),
    Fault("unknown data type", head(datatype=3), "its header is not valid", "export it again"),
    Fault("infinite intercept", head(scl_slope=1, scl_inter=np.inf), "its header is not valid", "export it again"),
    Fault("nan offset", head(vox_offset=np.nan), "data start at byte nan", "export it again"),
    Fault("offset beyond the end", head(vox_offset=1e30), r"data start at byte 1\d{30}", "export it again"),
    Fault("offset in the header", head(vox_offset=16), "data start at byte 16", "export it again"),
    Fault("bad magic", head(magic=b"n+7"), "is not a NIfTI file", "convert it"),
    Fault("half of a pair", head(magic=b"ni1"), r"is one half of a \.hdr/\.img pair", "convert the pair"),
    # the file
    Fault("empty file", raw(lambda _: b""), "is not a NIfTI file", "convert it"),
    Fault("text", raw(lambda _: b"no image at all"), "is not a NIfTI file", "convert it"),
    Fault("zipped text", raw(lambda _: gzip.compress(b"no image" * 99)), "is not a NIfTI file", "convert it"),
    Fault("cut in the header", raw(lambda b: b[:60]), DAMAGED, COPY),
    Fault("cut in the data", raw(lambda b: b[: len(b) // 3]), DAMAGED, COPY),
    Fault("cut behind ED and ES", raw(lambda b: b[:-40]), DAMAGED, COPY),
    Fault("wrong checksum", raw(lambda b: b[:-8] + b"\0\0\0\0" + b[-4:]), DAMAGED, COPY, layouts=(ACDC,)),
    Fault("garbage behind", raw(lambda b: b + b"garbage"), DAMAGED, COPY),
    Fault("folder", in_place_of("image", Path.mkdir), r"cannot be opened \(Is a directory\)", OPENED),
    Fault("broken link", in_place_of("image", lambda p: p.symlink_to(p.parent / "gone")), "no such file", MISSING),
    Fault("link to itself", in_place_of("image", lambda p: p.symlink_to(p)), r"cannot be opened \(Too many", OPENED),
    Fault("link that leaves", moved_out, "a link that leaves the data folder", "follow_links=true"),
    # the image's voxels
    Fault("nan voxel", image(voxel(np.nan)), "1 voxels are NaN or infinite", EXPORT),
    Fault("infinite voxel", image(voxel(-np.inf)), "1 voxels are NaN or infinite", EXPORT),
    Fault("beyond float32", image(voxel(1e300, np.float64)), "1 voxels are NaN or infinite", EXPORT),
    Fault("constant", image(lambda a: np.full_like(a, 7)), "the image is constant: every voxel is 7", EXPORT),
    Fault(
        "copy of another subject's", copy_of_fine(), "an image that is also subject (fine|patient001)'s", "remove", "-"
    ),
    Fault(
        "copy in another type",
        copy_of_fine(lambda a: a.astype(np.float32)),
        "an image that is also subject (fine|patient001)'s",
        "remove one of the two",
        "-",
    ),
    # the mask
    Fault("half a label", mask(voxel(0.5)), "values outside the coding: 0.5", CODING, "mask"),
    Fault("negative label", mask(voxel(-1, np.int16)), "values outside the coding: -1", CODING, "mask"),
    Fault("label 4", mask(voxel(4, np.uint8)), "values outside the coding: 4", CODING, "mask"),
    Fault("label 255", mask(voxel(255, np.uint8)), "values outside the coding: 255", CODING, "mask"),
    Fault("label 10^9", mask(voxel(1e9, np.int32)), "values outside the coding: 1000000000", CODING, "mask"),
    Fault("nan label", mask(voxel(np.nan)), "values outside the coding: nan", CODING, "mask"),
    Fault(
        "mask at other frames",
        mask(lambda a: np.roll(a, 1, axis=3)),
        r"empty at ED, frame 0 \(from 0\); it has labels at frames 1, 3$",
        PHASES,
        "mask",
        CINES,
    ),
    Fault("empty mask", mask(np.zeros_like), r"the mask is empty at ED, frame 0 \(from 0\)$", PHASES, "mask"),
    Fault(
        "mask of fewer frames",
        mask(lambda a: a[..., :2]),
        r"the mask has 2 frames, the image 4, and frame 2 \(from 0\) is wanted",
        "as many frames as the image",
        "mask",
        CINES,
    ),
    Fault(
        "mask of another matrix", mask(lambda a: a[::2]), "the mask is 12 × 20 × 3 voxels, the image 24", GRID, "mask"
    ),
    Fault(
        "mask of other voxels",
        mask(np.array, np.diag([1.5, 1.2, 8, 1])),
        "the mask's voxels are 1.5 × 1.2 × 8 mm, the image's 1.5 × 1.5 × 8 mm",
        "layouts.trust_mask_place=",
        "mask",
    ),
    Fault("mirrored mask", mask(np.array, np.diag([-1.5, 1.5, 8, 1])), "columns run the other way", GRID, "mask"),
    Fault("turned mask", mask(np.array, np.diag([-1.5, -1.5, 8, 1])), "columns and rows run the other", GRID, "mask"),
    Fault("mask with axes swapped", mask(np.array, AFFINE[[1, 0, 2, 3]]), "axes are in another order", GRID, "mask"),
    Fault(
        "mask beside the image",
        mask(np.array, moved((30, 40, 0))),
        "the mask lies 50.0 mm beside the image",
        "layouts.trust_mask_place=",
        "mask",
    ),
    Fault("ACDC's order", labels(0, 3, 2, 1), "look like RV 1, MYO 2, LV 3 but are", ORDER, "mask", CINES),
    Fault("CMRxMotion's order", labels(0, 1, 3, 2), "look like LV 1, RV 2, MYO 3 but are", ORDER, "mask", CINES),
    Fault("M&Ms' order", labels(0, 3, 2, 1), "look like LV 1, MYO 2, RV 3 but are", ORDER, "mask", (ACDC,)),
    Fault("cut mask", raw(lambda b: b[:-40], "mask"), DAMAGED, COPY, "mask"),
    Fault("mask that is none", raw(lambda _: b"no mask", "mask"), "is not a NIfTI file", "convert it", "mask"),
    Fault("mask's own folder", in_place_of("mask", Path.mkdir), r"cannot be opened \(Is a direct", OPENED, "mask"),
    # M&Ms
    Fault("no image", lambda s: s.image.unlink(), "no image in its folder", MISSING, layouts=(MNMS,)),
    Fault("no mask", lambda s: s.mask.unlink(), "no mask in any part of the data set", "copy it", "mask", (MNMS,)),
    Fault("no row", cell("External code", "someone"), "has no row for this subject", "add the row", "table", (MNMS,)),
    Fault("two rows", rows_twice, "has 2 rows for this subject", "leave one of them", "table", (MNMS,)),
    Fault("no vendor", cell("Vendor", ""), "vendor is empty", "fill in A, B, C or D", "table", (MNMS,)),
    Fault("ED = ES", cell("ES", "0"), "has ED 0 and ES 0 for a labelled", "fill in its 0-based", "table", (MNMS,)),
    Fault("no ES", cell("ES", ""), "has ED 0 and ES empty for a labelled", "fill in its 0-based", "table", (MNMS,)),
    Fault("text for ED", cell("ED", "end"), "ED is 'end'", NUMBER, "table", (MNMS,)),
    Fault("fraction for ED", cell("ED", "0.5"), "ED is '0.5'", NUMBER, "table", (MNMS,)),
    Fault("nan for ED", cell("ED", "nan"), "ED is 'nan'", NUMBER, "table", (MNMS,)),
    Fault("ES beyond", cell("ES", "4"), "has no frame 4: its frames are 0 to 3", PHASES, "mask", (MNMS,)),
    Fault(
        "ES beyond, of all",
        cell("ES", "4"),
        "ES is frame 4, but the image has frames 0 to 3",
        "correct ES",
        layouts=(MNMS,),
        options={"frames": "all"},
    ),
    # ACDC
    Fault("no Info.cfg", lambda s: s.table.unlink(), "is absent, so which frame", MISSING, "table", (ACDC,)),
    Fault("Info.cfg a folder", in_place_of("table", Path.mkdir), "cannot be read", "copy it again", "table", (ACDC,)),
    Fault("Info.cfg binary", lambda s: s.table.write_bytes(b"\xff\xfe"), "cannot be read", "copy", "table", (ACDC,)),
    Fault("no ED", info("ES: 3\n"), "has no line ED", "1-based", "table", (ACDC,)),
    Fault("text for ED", info("ED: end\nES: 3\n"), "ED is 'end'", "1, 2, 3", "table", (ACDC,)),
    Fault("ED from 0", info("ED: 0\nES: 3\n"), "ED is '0'", "1, 2, 3", "table", (ACDC,)),
    Fault("endless ED", info(f"ED: {'9' * 5000}\nES: 3\n"), "ED is '9", "1, 2, 3", "table", (ACDC,)),
    Fault("ED = ES", info("ED: 3\nES: 3\n"), "ED and ES are the same frame", "correct one", "table", (ACDC,)),
    Fault(
        "ES beyond", info("ED: 1\nES: 9\n"), "ES is frame 8, but the image has", "correct ES", "{}_4d.nii.gz", (ACDC,)
    ),
    Fault(
        "no image of ES",
        lambda s: [next(s.image.parent.glob(f"*_{end}.nii.gz")).unlink() for end in ("frame03", "4d")],
        "no image of ES, neither this file nor patient002_4d.nii.gz",
        MISSING,
        "{}_frame03.nii.gz",
        (ACDC,),
    ),
    Fault(
        "frames of two sizes",
        lambda s: [saved(p, loaded(p)[:-4]) for p in s.image.parent.glob("*_frame03*.nii.gz")],
        "its slices are 20 × 20, another frame's 20 × 24",
        "list the frames as subjects of their own in a table",
        "{}_frame03.nii.gz",
        (ACDC,),
    ),
    # a table
    Fault("no file of that name", cell("image", "gone.nii.gz"), "no such file", MISSING, "gone.nii.gz", (TABLE,)),
    Fault("no mask of that name", cell("mask", "gone.nii.gz"), "no such file", MISSING, "gone.nii.gz", (TABLE,)),
    Fault("path up", cell("image", "images/../../x.nii.gz"), "leaves the data folder", OUTSIDE, "table", (TABLE,)),
    Fault("path from the root", cell("mask", "/etc/passwd"), "leaves the data folder", OUTSIDE, "table", (TABLE,)),
    Fault("Windows path up", cell("image", r"..\x.nii.gz"), "leaves the data folder", OUTSIDE, "table", (TABLE,)),
    Fault("Windows drive", cell("image", r"C:\x.nii.gz"), "leaves the data folder", OUTSIDE, "table", (TABLE,)),
    Fault("Windows share", cell("image", r"\\pc\x.nii.gz"), "leaves the data folder", OUTSIDE, "table", (TABLE,)),
    Fault("URL", cell("image", "https://x.org/x.nii.gz"), "leaves the data folder", OUTSIDE, "table", (TABLE,)),
    Fault("endless path", cell("mask", "x" * 5000), r"cannot be opened \(File name too long\)", OPENED, "x+", (TABLE,)),
    Fault("line break", cell("image", "po\nor.nii.gz"), "image has a line break", "write it anew", "table", (TABLE,)),
    Fault(
        "escape in a name", cell("vendor", "\x1b[31mX"), "vendor has a line break or a c", "write", "table", (TABLE,)
    ),
    Fault("no image", cell("image", ""), "image is empty", "fill in the image", "table", (TABLE,)),
    Fault("no vendor", cell("vendor", ""), "vendor is empty", "fill in the vendor", "table", (TABLE,)),
    Fault("ED = ES", cell("es", "0"), "ed and es are the same frame", "correct one of them", "table", (TABLE,)),
    Fault("negative ED", cell("ed", "-1"), "ed is '-1'", NUMBER, "table", (TABLE,)),
    Fault("fraction for ED", cell("ed", "0.5"), "ed is '0.5'", NUMBER, "table", (TABLE,)),
    Fault("text for ED", cell("ed", "end"), "ed is 'end'", NUMBER, "table", (TABLE,)),
    Fault("nan for ED", cell("ed", "nan"), "ed is 'nan'", NUMBER, "table", (TABLE,)),
    Fault("infinite ES", cell("es", "inf"), "es is 'inf'", NUMBER, "table", (TABLE,)),
    Fault("ES beyond 32 bits", cell("es", "1e12"), "es is '1e12'", NUMBER, "table", (TABLE,)),
    Fault(
        "ES beyond", cell("es", "4"), "ES is frame 4, but the image has frames 0 to 3", "correct ES", layouts=(TABLE,)
    ),
    Fault("unknown split", cell("split", "dev"), "split is 'dev'", "write train, validation", "table", (TABLE,)),
    Fault("spacing in words", cell("spacing", "wide"), "spacing is 'wide'", "in mm: 8 1.4 1.4", "table", (TABLE,)),
    Fault(
        "spacing of zero", cell("spacing", "8 0 0"), "spacing given for it is 8 × 0 × 0 mm", "in mm", layouts=(TABLE,)
    ),
    Fault("labels unknown", cell("labels", "LA 1"), "labels is 'LA 1'", "LV 3, MYO 2, RV 1", "table", (TABLE,)),
    Fault("labels twice", cell("labels", "LV 1, RV 1"), "labels is 'LV 1, RV 1'", "name and value", "table", (TABLE,)),
    Fault(
        "labels that lack one", cell("labels", "LV 1, MYO 2"), "values outside the coding: 3", "1, 2", "mask", (TABLE,)
    ),
]
