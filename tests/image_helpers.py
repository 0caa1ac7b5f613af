"""ICC profiles and PNG files that Pillow does not write: for the tests of colors and of transparency."""

import struct
import zlib

import numpy as np

LIMITED = {1: 1, 2: 2, 4: 9, 8: 77, 16: 0x8000}  # by bits: a transparent value


def _s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + _s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(space: bytes, kind: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2.4 for the pixels of a color space."""
    name = b"test"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79
    white = b"XYZ \0\0\0\0" + _s15(0.9642, 1, 0.8249)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": white} | tags
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for key, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += key + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"test", 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _s15(0.9642, 1, 0.8249)
    return head + b"\0" * (128 - len(head)) + table + body


def rgb_profile(primaries: tuple[tuple[float, float, float], ...], curve: bytes) -> bytes:
    """A profile of the XYZ (D50) of red, green and blue, and one curve for all."""
    tags = {
        name: b"XYZ \0\0\0\0" + _s15(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    return profile(b"RGB ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def cmyk_profile(lab: dict[tuple[int, int, int, int], tuple[float, float, float]]) -> bytes:
    """A profile of a press: the Lab of its inks' corners, white (100, 0, 0) for those that are not given."""
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    grid = bytes(
        round(value)
        for corner in corners
        for value in (lambda lightness, a, b: (lightness * 2.55, a + 128, b + 128))(*lab.get(corner, (100, 0, 0)))
    )
    line = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + _s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + line * 4 + grid + line * 3
    return profile(b"CMYK", b"prtr", {b"A2B0": table}, pcs=b"Lab ")


PROPHOTO = rgb_profile(((0.79767, 0.28804, 0), (0.13519, 0.71188, 0), (0.03134, 0.00009, 0.82491)), _curve(1.8))
DISPLAY_P3 = rgb_profile(
    ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), SRGB_CURVE
)
SRGB = rgb_profile(((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)), SRGB_CURVE)
GRAY_LINEAR = profile(b"GRAY", b"mntr", {b"kTRC": _curve(1.0)})
COATED = cmyk_profile({(1, 0, 0, 0): (55, -37, -50), (0, 1, 0, 0): (48, 74, -3), (0, 0, 0, 1): (16, 0, 0)})


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(bits: int, channels: int, values: list[int], clear: int) -> bytes:
    """A PNG of 16 columns for each value of gray or of equal RGB, with `clear` as the transparent color."""
    across = np.repeat(values, 16 * channels)
    digits = "".join(format(value, f"0{bits}b") for value in across)
    row = b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    header = struct.pack(">IIBBBBB", 16 * len(values), 16, bits, 2 if channels == 3 else 0, 0, 0, 0)
    content = chunk(b"IHDR", header)
    content += chunk(b"tRNS", struct.pack(">H", clear) * channels)
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IDAT", zlib.compress(row * 16)) + chunk(b"IEND", b"")


def gray_tiff(bits: int, values: list[int], zero_is_white: bool = False) -> bytes:
    """A little-endian TIFF of 16 rows, each with 16 pixels of each value of gray, of 12 or 16 bits."""
    across = np.repeat(values, 16)
    row = across.astype("<u2").tobytes()
    if bits == 12:  # packed from the highest bit on
        row = int("".join(format(value, "012b") for value in across), 2).to_bytes(len(across) * 12 // 8, "big")
    tags = {256: len(across), 257: 16, 258: bits, 259: 1, 262: 0 if zero_is_white else 1, 273: 8, 277: 1, 278: 16}
    tags[279] = len(row) * 16
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    head = b"II*\0" + struct.pack("<I", 8 + len(row) * 16)
    return head + row * 16 + struct.pack("<H", len(tags)) + entries + bytes(4)
