"""The loss curve: a picture that holds the records, and a chart in text where matplotlib is missing."""

import math
import subprocess
import sys

import pytest

from fastattn import plot
from fastattn.train import plot_loss

LOG = [
    *({"event": "train", "step": s, "loss": 3 + 6 * math.exp(-s / 40)} for s in range(1, 201, 5)),
    *({"event": "eval", "step": s, "loss": 3.3 + 6 * math.exp(-s / 40)} for s in range(0, 201, 50)),
    {"event": "warning", "step": 3, "text": "x"},
    {"event": "train", "step": 201, "loss": "nan"},
]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved, save = [], plot.save
    monkeypatch.setattr(
        plot, "save", lambda figure, *args, **kw: (saved.append(figure), save(figure, *args, **kw))
    )
    return saved


def test_the_picture_holds_both_curves_names_and_units(tmp_path, figures):
    assert plot_loss(LOG, tmp_path / "new" / "loss.png", title="a run of $5 and $6")
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): list(zip(*line.get_data())) for line in axes.get_lines()}
    for name, event in (("training", "train"), ("validation", "eval")):
        records = [(r["step"], r["loss"]) for r in LOG if r["event"] == event and r["loss"] != "nan"]
        assert drawn[name] == records
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]
    assert axes.get_title(loc="left") == "a run of $5 and $6: validation 3.340 at step 200 (perplexity 28.2)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats per token)")


def test_a_loss_that_is_not_of_tokens_has_no_perplexity(tmp_path, figures):
    plot_loss(LOG, tmp_path / "loss.png", unit=None)
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "loss"
    assert axes.get_title(loc="left") == "Loss: validation 3.340 at step 200"


def test_svg_keeps_its_text_and_the_same_bytes(tmp_path):
    for name in ("first.svg", "again.svg"):
        plot_loss(LOG, tmp_path / name)
    first = (tmp_path / "first.svg").read_bytes()
    assert first == (tmp_path / "again.svg").read_bytes()
    assert b"loss (nats per token)" in first


def test_a_log_file_will_do_and_an_empty_one_will_not(tmp_path, figures):
    (tmp_path / "log.jsonl").write_text('{"event": "train", "step": 1, "loss": 2.5}\n')
    plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    (line,) = figures[0].axes[0].get_lines()
    assert line.get_marker() != ""  # a single point has no line to be seen by
    with pytest.raises(ValueError, match="no finite loss"):
        plot_loss([{"event": "train", "step": 1, "loss": "nan"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_it_says_the_curve_and_how_to_get_the_picture(tmp_path):
    script = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from fastattn.train import plot_loss
log = [{{"event": "eval", "step": s, "loss": 5 - s / 10}} for s in (0, 10, 20)]
assert plot_loss(log, {str(tmp_path / "loss.png")!r}) is False
said = []
plot_loss(log, {str(tmp_path / "loss.png")!r}, title="mine", say=said.append)
assert said[0].startswith("mine: validation 3.000 at step 20")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    assert lines[0] == "Loss: validation 3.000 at step 20 (perplexity 20.1)"
    assert "".join(lines).count("o") > 3
    assert lines[1].strip().startswith("5 |")
    assert lines[-1] == "For a picture of it: pip install 'fastattn[plot]'"
