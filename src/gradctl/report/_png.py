"""Write a heat map as one PNG data URI: eight bits a cell, a palette, and nothing but zlib and struct."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

Colour = tuple[int, int, int]


def data_uri(cells: Sequence[bytes], palette: Sequence[Colour], *, transparent: int = 1) -> str:
    """Return `data:image/png;base64,...` of a picture with one pixel a cell.

    Args:
        cells: rows from the top, each one byte a pixel: an index into `palette`. All rows have the same length.
        palette: at most 256 colours, red, green, blue in 0 to 255.
        transparent: how many of the first palette entries are fully transparent.

    Raises:
        ValueError: there are no cells, or the rows differ in length.
    """
    if not cells or not cells[0] or any(len(row) != len(cells[0]) for row in cells):
        raise ValueError(f"a picture needs rows of one length above 0, got {[len(row) for row in cells[:4]]}")
    header = struct.pack(">IIBBBBB", len(cells[0]), len(cells), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in cells), 9)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", bytes(channel for colour in palette for channel in colour)),
            _chunk(b"tRNS", bytes(transparent)),
            _chunk(b"IDAT", pixels),
            _chunk(b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def ramp(stops: Sequence[Colour], count: int) -> list[Colour]:
    """Return `count` colours spread evenly along `stops`, straight between neighbours."""
    colours: list[Colour] = []
    for k in range(count):
        place = k / max(1, count - 1) * (len(stops) - 1)
        index = min(int(place), len(stops) - 2)
        share = place - index
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(stops[index], stops[index + 1], strict=True))
        colours.append((red, green, blue))
    return colours


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
