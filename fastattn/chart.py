"""Line charts as PNG bytes with numpy alone, so that a loss curve needs no plotting library."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Point = tuple[float, float]
Image = npt.NDArray[np.float64]  # (height, width, 3) in [0, 1]

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 80, 64  # margins around the plot area, in pixels
INK, GRID = (0.2, 0.2, 0.2), (0.88, 0.88, 0.88)
COLOURS = ((0.12, 0.40, 0.75), (0.85, 0.35, 0.10), (0.20, 0.60, 0.30), (0.55, 0.30, 0.65))

# Strokes of points "xy" on a grid 5 wide: capitals and digits span y 0 to 6, small letters 2 to 6, descenders reach 8.
GLYPHS = {
    "0": "10 30 41 45 36 16 05 01 10", "1": "01 20 26|06 46", "2": "01 10 30 41 42 06 46",
    "3": "01 10 30 41 42 33 44 45 36 16 05|23 33", "4": "36 30 04 44", "5": "40 00 03 33 44 45 36 06",
    "6": "41 30 10 01 05 16 36 45 44 33 13 04", "7": "00 40 16",
    "8": "13 02 01 10 30 41 42 33 13 04 05 16 36 45 44 33", "9": "42 33 13 02 01 10 30 41 45 36 16 05",
    ".": "26 26", ",": "26 17", "-": "13 33", "+": "13 33|22 24", ":": "23 23|26 26", "/": "40 06",
    "(": "30 21 25 36", ")": "10 21 25 16", "=": "03 43|05 45", "_": "07 47",
    "a": "12 32 43 46|44 14 05 16 36 45", "b": "00 06|03 12 32 43 45 36 16 05", "c": "43 32 12 03 05 16 36 45",
    "d": "40 46|43 32 12 03 05 16 36 45", "e": "04 44 43 32 12 03 05 16 36", "f": "40 30 21 26|12 32",
    "g": "42 47 38 18|43 32 12 03 05 16 36 45", "h": "00 06|03 12 32 43 46", "i": "20 20|12 22 26|16 36",
    "j": "30 30|22 32 37 28 18", "k": "00 06|42 04|14 46", "l": "10 20 26|16 36", "m": "02 06|03 12 23 26|23 32 43 46",
    "n": "02 06|03 12 32 43 46", "o": "12 32 43 45 36 16 05 03 12", "p": "02 08|03 12 32 43 45 36 16 05",
    "q": "42 48|43 32 12 03 05 16 36 45", "r": "02 06|03 12 32 43", "s": "43 32 12 03 14 34 45 36 16 05",
    "t": "20 25 36 46|12 42", "u": "02 05 16 36 45|42 46", "v": "02 26 42", "w": "02 16 23 36 42", "x": "02 46|42 06",
    "y": "02 26|42 18", "z": "02 42 06 46",
}  # fmt: skip
TEXT = 1.7  # pixels to a grid unit
ADVANCE = 6  # grid units from one character to the next


def line_chart(series: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str) -> bytes:
    """A PNG of one line per series over common linear axes; points that are not finite are left out.

    Text is drawn in small letters. Raises ValueError when no finite point is left.
    """
    lines = {name: [p for p in points if math.isfinite(p[0] + p[1])] for name, points in series.items()}
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("series: got no finite point, needs at least one")
    image = np.ones((HEIGHT, WIDTH, 3))
    x_ticks, y_ticks = _ticks([x for x, _ in points]), _ticks([y for _, y in points])

    def place(x: float, y: float) -> Point:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for tick in x_ticks:
        x, bottom = place(tick, y_ticks[0])
        _draw(image, [[(x, TOP), (x, bottom)]], GRID, 1.0)
        _write(image, _number(tick), x, bottom + 10, anchor=0.5)
    for tick in y_ticks:
        left, y = place(x_ticks[0], tick)
        _draw(image, [[(left, y), (WIDTH - RIGHT, y)]], GRID, 1.0)
        _write(image, _number(tick), left - 12, y - 5, anchor=1.0)
    _draw(image, [[(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)]], INK, 1.4)
    _write(image, title, WIDTH / 2, 16, anchor=0.5, size=2.2)
    _write(image, x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 26, anchor=0.5)
    _write(image, y_label, 16, TOP - 26, anchor=0.0)

    legend = WIDTH - RIGHT - 16 - max(len(name) for name in lines) * ADVANCE * TEXT
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        _draw(image, [[place(x, y) for x, y in line]], colour, 2.0)
        y = TOP + 20 + 22 * index
        _draw(image, [[(legend - 40, y), (legend - 10, y)]], colour, 3.0)
        _write(image, name, legend, y - 5, anchor=0.0)
    return _png(image)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, 4 to 10 of them, that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * unit for m in (1, 2, 5, 10) if span / (m * unit) <= 8)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}".replace("e+0", "e").replace("e-0", "e-")


def _write(image: Image, text: str, x: float, y: float, *, anchor: float, size: float = TEXT) -> None:
    """Draw text with its top at y; x is its left edge (anchor 0), middle (0.5) or right edge (1)."""
    x -= anchor * (len(text) * ADVANCE - 2) * size
    strokes = []
    for index, character in enumerate(text.lower()):
        for stroke in GLYPHS.get(character, "").split("|"):
            points = [
                (x + (index * ADVANCE + int(p[0])) * size, y + int(p[1]) * size) for p in stroke.split()
            ]
            strokes.append(points)
    _draw(image, strokes, INK, 0.8 * size)


def _draw(image: Image, lines: Sequence[Sequence[Point]], colour: tuple[float, ...], width: float) -> None:
    """Blend polylines into the image; a pixel's coverage falls off within one pixel of the line's edge."""
    coverage = np.zeros(image.shape[:2])
    reach = width / 2 + 1
    for line in lines:
        for (x0, y0), (x1, y1) in zip(line, line[1:] or line):
            top, bottom = int(max(min(y0, y1) - reach, 0)), int(min(max(y0, y1) + reach + 1, image.shape[0]))
            left, right = int(max(min(x0, x1) - reach, 0)), int(min(max(x0, x1) + reach + 1, image.shape[1]))
            if top >= bottom or left >= right:
                continue
            ys, xs = np.mgrid[top:bottom, left:right]
            length = (x1 - x0) ** 2 + (y1 - y0) ** 2
            along = ((xs - x0) * (x1 - x0) + (ys - y0) * (y1 - y0)) / length if length else 0.0
            along = np.clip(along, 0, 1)
            distance = np.hypot(xs - x0 - along * (x1 - x0), ys - y0 - along * (y1 - y0))
            window = coverage[top:bottom, left:right]
            np.maximum(window, np.clip(width / 2 + 0.5 - distance, 0, 1), out=window)
    image += coverage[..., None] * (np.array(colour) - image)


def _png(image: Image) -> bytes:
    height, width, _ = image.shape
    pixels = np.rint(image * 255).astype(np.uint8).reshape(height, width * 3)
    rows = np.concatenate(
        [np.zeros((height, 1), np.uint8), pixels], axis=1
    )  # each row starts with filter type 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB, not interlaced
    body = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
