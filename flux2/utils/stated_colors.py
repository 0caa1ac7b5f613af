"""The color space that an image file states: an ICC profile, or numbers from which a profile is made here.

Pillow gives the ICC profile of most formats. It does not read cICP in PNG, nclx in AVIF and the color boxes of
JPEG 2000, and reads gAMA and cHRM of PNG without applying them. `data.sources.stated_colors` and
`flux2.utils.stated_colors` are the same file, because training and inference import nothing of each other and must show
a file in the same colors.

The order of a PNG is that of its standard, third edition: cICP, iCCP, sRGB, gAMA with cHRM.
"""

import logging
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)
Point = tuple[float, float]  # chromaticity x, y
D65 = (0.3127, 0.329)
SRGB = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # white, red, green, blue
SRGB_GAMMA = 0.45455  # as PNG files state it
ROUNDING = 0.005  # of chromaticities: some programs write two decimals
MOST_PROFILE = 1 << 24  # bytes
# by the codes of ITU-T H.273, which cICP and nclx use; 2 is "unspecified"
PRIMARIES = {
    1: SRGB,
    2: SRGB,
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),  # BT.601, 625 lines
    6: (D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),  # BT.601, 525 lines
    7: (D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: (D65, (0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),  # BT.2020
    11: ((0.314, 0.351), (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),  # DCI P3
    12: (D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),  # Display P3
}
# exponents; None is the curve of sRGB, and stands for those of BT.709, BT.601 and BT.2020, which displays show alike
TRANSFERS = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
HDR = {16: "PQ", 18: "HLG"}
JP2_SRGB = (0, 12, 15, 16, 17, 18)  # black and white, CMYK, sRGB, gray, sYCC, which the decoder converts
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D50 = np.array([0.9642, 1.0, 0.8249])


class StatedColors(NamedTuple):
    """The colors of an image, as far as they can be applied."""

    profile: bytes | None  # an ICC profile; None: the numbers count as sRGB
    problem: str = ""  # what is not applied, to follow the name of the image
    is_hdr: bool = False  # its light has no conversion to sRGB


def stated_colors(image: Image.Image) -> StatedColors:
    """Return the color space of an opened image, whose pixels are not loaded yet: that may close its file."""
    profile = image.info.get("icc_profile") or None
    problem = ""
    stream = getattr(image, "fp", None)
    if stream is not None and image.format in ("PNG", "AVIF", "JPEG2000"):
        before = stream.tell()
        try:
            found = _read(stream, image.format, profile)
        except (struct.error, ValueError) as error:
            found = StatedColors(profile, f"its color space cannot be read ({error})")
        finally:
            stream.seek(before)
        if found is not None and (found.is_hdr or not found.problem):
            return found
        problem = "" if found is None else found.problem
    if image.format != "PNG" or profile or "srgb" in image.info:
        return StatedColors(profile, problem)
    numbers = _gamma_and_primaries(image.info.get("gamma"), image.info.get("chromaticity"))
    return numbers._replace(problem=problem or numbers.problem)


@lru_cache(maxsize=64)
def _named(problem: str) -> list[str]:
    """Return the list of the images that were warned about because of a problem: the same list each time."""
    return []


def warn_of_colors(problem: str, name: str) -> None:
    """Warn about a problem with colors, by the first image that has it."""
    if not (names := _named(problem)):
        names.append(name)
        log.warning("the colors of %s, and of others like it, may be wrong: %s", name, problem)


def is_recolored(image: Image.Image) -> bool:
    """Return whether an opened image states its colors otherwise than by the ICC profile that Pillow gives."""
    found = stated_colors(image)
    return found.is_hdr or found.profile != (image.info.get("icc_profile") or None)


def _read(stream: IO[bytes], kind: str, profile: bytes | None) -> StatedColors | None:
    """Return what Pillow does not read: cICP, nclx without a profile, a color box of JPEG 2000; None without it."""
    if kind == "PNG":
        return None if (codes := _cicp(stream)) is None else _from_codes(*codes)
    if kind == "AVIF":
        if profile:
            return None
        for box in _color_boxes(stream, (b"meta", b"iprp", b"ipco")):
            if box.startswith(b"nclx"):
                return _from_codes(*struct.unpack_from(">HH", box, 4))  # the decoder applies matrix and range
        return None
    stream.seek(0)
    if stream.read(2) == b"\xff\x4f":  # a codestream without boxes
        return None
    found = None
    for box in _color_boxes(stream, (b"jp2h",)):
        found = _from_jp2(box)
        if not found.problem:
            break
    return found


def _cicp(stream: IO[bytes]) -> tuple[int, int, int, int] | None:
    """Return primaries, transfer, matrix and range of a PNG's cICP, which precedes its pixels."""
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"cICP":
            return struct.unpack(">4B", stream.read(length)[:4])
        if kind == b"IDAT":
            return None
        stream.seek(length + 4, 1)  # data and checksum
    return None


def _color_boxes(stream: IO[bytes], path: tuple[bytes, ...]) -> Iterator[bytes]:
    """Yield the content of the `colr` boxes below a path of boxes, of the first of each kind."""
    end = stream.seek(0, 2)
    stream.seek(0)
    for kind in path:
        end = next((stop for found, stop in _boxes(stream, end) if found == kind), 0)
        stream.seek(4 if kind == b"meta" and end else 0, 1)  # version and flags
    for found, stop in _boxes(stream, end):
        if found == b"colr":
            yield stream.read(min(stop - stream.tell(), MOST_PROFILE))


def _boxes(stream: IO[bytes], end: int) -> Iterator[tuple[bytes, int]]:
    """Yield kind and end of each box up to `end`, with the stream at its content."""
    while (start := stream.tell()) + 8 <= end:
        size, kind = struct.unpack(">I4s", stream.read(8))
        if size == 1:
            (size,) = struct.unpack(">Q", stream.read(8))
        stop = start + size if size else end
        if not stream.tell() <= stop <= end:
            raise ValueError("a box is longer than its file")
        yield kind, stop
        stream.seek(stop)


def _from_jp2(box: bytes) -> StatedColors:
    (method,) = struct.unpack_from(">B", box)
    if method in (2, 3):  # an ICC profile, restricted or any
        return StatedColors(box[3:])
    if method == 5:
        return _from_codes(*struct.unpack_from(">HH", box, 3))
    space = struct.unpack_from(">I", box, 3)[0] if method == 1 else f"of method {method}"
    problem = "" if space in JP2_SRGB else f"its color space {space} of JPEG 2000 is not supported: save it as sRGB"
    return StatedColors(None, problem)


def _from_codes(primaries: int, transfer: int, matrix: int = 0, full_range: int = 1) -> StatedColors:
    """Return the colors of codes of ITU-T H.273."""
    if transfer in HDR:
        return StatedColors(None, f"it is an HDR image ({HDR[transfer]}): save it as sRGB", is_hdr=True)
    if primaries not in PRIMARIES or transfer not in TRANSFERS or matrix or not full_range:
        codes = f"primaries {primaries}, transfer {transfer}, matrix {matrix}, full range {full_range}"
        return StatedColors(None, f"its color space ({codes}) is not supported: save it as sRGB")
    return _profile(PRIMARIES[primaries], TRANSFERS[transfer])


def _gamma_and_primaries(gamma: float | None, stated: tuple[float, ...] | None) -> StatedColors:
    """Return the colors of a PNG's gAMA and cHRM; what is missing is that of sRGB."""
    x, y = (stated[::2], stated[1::2]) if stated else ((), ())
    points = tuple(zip(x, y, strict=True)) or SRGB
    if gamma is None or abs(gamma - SRGB_GAMMA) <= 0.02:
        return _profile(points, None)
    if not 0.1 <= gamma <= 10:
        return _profile(points, None)._replace(problem=f"its gamma {gamma:g} is not usable: save it as sRGB")
    return _profile(points, 1 / gamma)


def _profile(points: tuple[Point, ...], exponent: float | None) -> StatedColors:
    """Return the colors of white, red, green and blue and of a curve: sRGB, or an ICC profile that is made of them."""
    if np.abs(np.subtract(points, SRGB)).max() <= ROUNDING:
        points = SRGB
        if exponent is None:
            return StatedColors(None)
    if (columns := _columns(points)) is None:
        return StatedColors(None, "its primaries (cHRM) are not those of a color space: save it as sRGB")
    curve = (3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if exponent is None else (0, exponent)
    return StatedColors(_icc(columns, curve[0], curve[1:]))


def _columns(points: tuple[Point, ...]) -> np.ndarray | None:
    """Return XYZ (3, 3) of red, green and blue, adapted to D50 by Bradford; None if these points give no colors."""
    xyz = np.array([(x, y, 1 - x - y) for x, y in points])
    if not 0 <= np.min(points) <= np.max(points) <= 1 or xyz[0].min() < 0.05:
        return None
    white = xyz[0] / xyz[0, 1]
    try:
        shares = np.linalg.solve(xyz[1:].T, white)
    except np.linalg.LinAlgError:
        return None
    adapted = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD
    columns = xyz[1:] * shares[:, None] @ adapted.T
    return columns if shares.min() > 0 and np.abs(columns).max() < 10 else None


def _icc(columns: np.ndarray, form: int, curve: tuple[float, ...]) -> bytes:
    """Return an ICC profile (version 4) of XYZ columns (3, 3), D50, and a parametric curve (ICC.1, 10.18)."""
    tags = {b"wtpt": _fixed(b"XYZ \0\0\0\0", D50)}
    tags |= {name: _fixed(b"XYZ \0\0\0\0", xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _fixed(b"para\0\0\0\0" + struct.pack(">HH", form, 0), curve))
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(b"", D50)
    return head.ljust(128, b"\0") + table + body


def _fixed(head: bytes, values: "np.ndarray | tuple[float, ...]") -> bytes:
    """Return numbers after a head as s15Fixed16, the ICC's fixed point."""
    return head + struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))
