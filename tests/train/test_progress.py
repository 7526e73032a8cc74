"""Progress: a bar for terminals, sparse plain lines for pipes."""

import io

from rich.console import Console

from fastattn.train import progress
from fastattn.train.progress import BarDisplay, LineDisplay, default_display

VALUES = {"step": 7, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 12345.6}


def test_plain_lines_are_spaced_in_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = LineDisplay(stream, seconds=5)
    display.start(0.0)
    for step in range(1, 21):
        now[0] += 1
        display.step(step / 40, {**VALUES, "step": step})
    display.note("saved")
    display.stop()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 5: loss 2.5000, lr 1.00e-03, 12,346 tokens/s, 0:35 left"
    assert [line.split(":")[0] for line in lines] == ["step 5", "step 10", "step 15", "step 20", "saved"]
    assert "\x1b" not in stream.getvalue()


def test_time_left_counts_from_where_a_resumed_run_began(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = LineDisplay(stream, seconds=1)
    display.start(0.5)
    now[0] = 3600
    display.step(0.75, VALUES)
    assert "1:00:00 left" in stream.getvalue()


def test_bar_shows_loss_speed_and_time_left():
    stream = io.StringIO()
    display = BarDisplay(Console(file=stream, force_terminal=True, width=80))
    display.start(0.0)
    display.step(0.5, VALUES)
    display.note("step 7: validation [not markup]")
    display.stop()
    text = stream.getvalue()
    for part in ("step 7", "50%", "loss 2.500", "12,346 tokens/s", " left", "[not markup]"):
        assert part in text


def test_piped_output_gets_lines(capsys):
    assert isinstance(default_display(), LineDisplay)
