"""The loss curve: a valid PNG whose pixels show the curves, and round ticks around the data."""

import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.train.canvas import Canvas
from fastattn.train.plot import HEIGHT, SERIES, WIDTH, plot_loss, ticks
from fastattn.train.stroke_font import GLYPHS, layout


def decode_png(data):
    """Pixels of an 8-bit RGB PNG without filters, checking every chunk's length and checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, 1 + 3 * width)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


LOG = [
    *({"event": "train", "step": s, "loss": 3 + 6 * math.exp(-s / 40)} for s in range(1, 201, 5)),
    *({"event": "eval", "step": s, "loss": 3.3 + 6 * math.exp(-s / 40)} for s in range(0, 201, 50)),
    {"event": "warning", "step": 3, "text": "x"},
    {"event": "train", "step": 201, "loss": "nan"},
]


def test_picture_shows_both_curves_going_down(tmp_path):
    plot_loss(LOG, tmp_path / "new" / "loss.png", title="a run")
    pixels = decode_png((tmp_path / "new" / "loss.png").read_bytes()).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert (pixels[0] == 255).all()
    for _, _, color in SERIES:
        rows, columns = np.nonzero(np.abs(pixels[110:] - color).max(axis=2) < 12)
        left, right = rows[columns < WIDTH // 4].mean(), rows[columns > WIDTH * 3 // 4].mean()
        assert right - left > 100


def test_a_log_file_will_do_and_an_empty_one_will_not(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "train", "step": 1, "loss": 2.5}\n')
    plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    decode_png((tmp_path / "loss.png").read_bytes())
    with pytest.raises(ValueError, match="no finite loss"):
        plot_loss([{"event": "train", "step": 1, "loss": "nan"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 10))
def test_ticks_enclose_the_data_in_round_equal_steps(low, span, number):
    marks = ticks(low, low + span, number)
    steps = np.diff(marks)
    assert len(marks) >= 2
    assert (steps > 0).all()
    assert np.allclose(steps, steps[0], rtol=1e-6, atol=abs(low) * 1e-9)
    assert marks[0] <= low + 1e-6 * steps[0]
    assert marks[-1] >= low + span - 1e-6 * steps[0]
    if span > max(abs(low), 1.0) * 1e-5:
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(mantissa - round_one) for round_one in (1, 2, 2.5, 5, 10)) < 1e-3


def test_every_letter_draws_something_of_its_own():
    pictures = {}
    for letter in GLYPHS:
        canvas = Canvas(40, 40)
        canvas.text(10, 28, letter, size=18, color=(0, 0, 0))
        pictures[letter] = canvas.pixels.tobytes()
        assert canvas.pixels.min() < 100
    same = {"0", "O"}
    assert len(set(pictures.values())) == len(GLYPHS) - 1
    assert pictures["0"] == pictures["O"], same


def test_text_is_anchored_and_turned():
    def inked(**options):
        canvas = Canvas(100, 100)
        canvas.text(50, 50, "EEE", size=12, color=(0, 0, 0), **options)
        rows, columns, _ = np.nonzero(canvas.pixels < 128)
        return columns.min(), columns.max(), rows.min(), rows.max()

    start, end, turned = inked(), inked(anchor="end"), inked(upwards=True)
    assert start[0] >= 49
    assert end[1] <= 51
    assert (turned[1] - turned[0], turned[3] - turned[2]) == pytest.approx(
        (start[3] - start[2], start[1] - start[0]), abs=1
    )
    assert turned[3] <= 51


def test_drawing_outside_the_picture_is_cut_off():
    canvas = Canvas(20, 10)
    canvas.stroke([(-50.0, -50.0), (100.0, 100.0)], width=2, color=(0, 0, 0))
    canvas.stroke([(200.0, 200.0)], width=2, color=(0, 0, 0))
    canvas.text(10, 5, "", size=5, color=(0, 0, 0))
    assert canvas.pixels[5, 5].max() < 50
    assert (canvas.pixels[0, 15] == 255).all()


def test_width_of_text_grows_with_each_letter():
    widths = [layout("step 100"[:n])[1] for n in range(9)]
    assert widths[0] == 0
    assert widths == sorted(widths)
