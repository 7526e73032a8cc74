"""Charts: a valid PNG whose pixels are where the numbers say."""

import struct
import zlib

import numpy as np
import pytest

from fastattn import chart


def decode(png: bytes) -> np.ndarray:
    """(height, width, 3) uint8 of an unfiltered RGB PNG, every checksum verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 2)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def draw(series: dict[str, list[tuple[float, float]]]) -> np.ndarray:
    return decode(chart.line_chart(series, title="title", x_label="x", y_label="y"))


def colour(index: int) -> np.ndarray:
    return np.rint(np.array(chart.COLOURS[index]) * 255)


def test_a_line_runs_where_its_points_are() -> None:
    image = draw({"a": [(0, 0), (10, 10)]}).astype(float)
    assert image.shape == (chart.HEIGHT, chart.WIDTH, 3)
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    top, bottom = chart.TOP, chart.HEIGHT - chart.BOTTOM
    for share in (0.2, 0.5, 0.8):
        x, y = round(left + share * (right - left)), round(bottom - share * (bottom - top))
        near = image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
        assert np.abs(near - colour(0)).sum(axis=1).min() < 60
        beside = image[y + 20 : y + 25, x - 2 : x + 3].reshape(-1, 3)
        assert np.abs(beside - colour(0)).sum(axis=1).min() > 200


def test_each_series_has_its_colour_and_points_that_are_not_finite_are_left_out() -> None:
    nan = float("nan")
    image = draw({"a": [(0, 1.0), (1, nan), (2, 3.0)], "b": [(0, 2.0), (2, 2.0)]}).astype(float)
    for index in (0, 1):
        assert np.abs(image - colour(index)).sum(axis=2).min() < 10


@pytest.mark.parametrize("points", [[(5.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(1e6, 1e-9), (2e6, 3e-9)]])
def test_degenerate_ranges_are_drawn(points: list[tuple[float, float]]) -> None:
    assert draw({"a": points}).min() < 100


def test_ticks_are_round_and_enclose_the_values() -> None:
    ticks = chart._ticks([3.17, 7.9])
    assert ticks[0] <= 3.17
    assert ticks[-1] >= 7.9
    assert 4 <= len(ticks) <= 10
    assert ticks == pytest.approx([3, 4, 5, 6, 7, 8])


def test_nothing_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="series: got no finite point"):
        draw({"a": [(0, float("inf"))]})
