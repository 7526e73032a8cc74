"""A small drawing surface: anti-aliased strokes and text on RGB pixels, written as PNG with NumPy and zlib alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastattn.train.stroke_font import CAP_HEIGHT, layout

Color = tuple[int, int, int]
Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

LINE_TO_CAP = 0.13  # width of a letter's stroke over the height of a capital


class Canvas:
    """`height` x `width` white pixels; x to the right, y downwards, in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels: npt.NDArray[np.float64] = np.full((height, width, 3), 255.0)

    def stroke(self, points: Sequence[Point], *, width: float, color: Color) -> None:
        """Draw a polyline with round ends and joins; a single point is a dot."""
        self._strokes([points], width, color)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        color: Color,
        anchor: Anchor = "start",
        upwards: bool = False,
    ) -> None:
        """Write `text` with its baseline at y, capitals `size` pixels high; `upwards` turns it a quarter left."""
        strokes, length = layout(text)
        scale = size / CAP_HEIGHT
        shift = {"start": 0.0, "middle": -0.5, "end": -1.0}[anchor] * length * scale
        placed = []
        for stroke in strokes:
            along = [(shift + scale * u, scale * v) for u, v in stroke]
            placed.append([(x - v, y - u) if upwards else (x + u, y - v) for u, v in along])
        self._strokes(placed, max(size * LINE_TO_CAP, 1.0), color)

    def _strokes(self, strokes: Sequence[Sequence[Point]], width: float, color: Color) -> None:
        """Blend once by the largest coverage of all segments, so that joints and crossings are not darker."""
        points = np.array([point for stroke in strokes for point in stroke], dtype=np.float64).reshape(-1, 2)
        if not len(points):
            return
        height, breadth, _ = self.pixels.shape
        reach = width / 2 + 1
        left, right = _bounds(points[:, 0].min(), points[:, 0].max(), reach, breadth)
        top, bottom = _bounds(points[:, 1].min(), points[:, 1].max(), reach, height)
        coverage = np.zeros((max(bottom - top, 0), max(right - left, 0)))
        for stroke in strokes:
            moved = [(x - left, y - top) for x, y in stroke]
            for start, end in zip(moved, moved[1:] or moved):
                _cover(coverage, start, end, width)
        part = self.pixels[top:bottom, left:right]
        part += coverage[..., None] * (np.array(color, dtype=np.float64) - part)

    def png(self) -> bytes:
        """The picture as an 8-bit RGB PNG file."""
        height, width, _ = self.pixels.shape
        rows = np.rint(self.pixels).astype(np.uint8).reshape(height, width * 3)
        unfiltered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, deflate, not interlaced
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _bounds(low: float, high: float, reach: float, limit: int) -> tuple[int, int]:
    """Pixels of one axis within `reach` of [low, high], cut to the picture: first, and one past the last."""
    return max(int(low - reach), 0), min(int(high + reach) + 2, limit)


def _cover(coverage: npt.NDArray[np.float64], start: Point, end: Point, width: float) -> None:
    """Raise each pixel's coverage to that by the segment: 1 within half the width, falling to 0 over one pixel."""
    (x0, y0), (x1, y1) = start, end
    height, breadth = coverage.shape
    left, right = _bounds(min(x0, x1), max(x0, x1), width / 2 + 1, breadth)
    top, bottom = _bounds(min(y0, y1), max(y0, y1), width / 2 + 1, height)
    if left >= right or top >= bottom:
        return
    y, x = np.mgrid[top:bottom, left:right] + 0.5
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-12), 0.0, 1.0)
    distance = np.hypot(x - x0 - along * dx, y - y0 - along * dy)
    part = coverage[top:bottom, left:right]
    np.maximum(part, np.clip(width / 2 + 0.5 - distance, 0.0, 1.0), out=part)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
