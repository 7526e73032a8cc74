"""The home of matplotlib: the same bytes every time, round ticks, text charts, and no import of it elsewhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import plot

ROOT = Path(__file__).resolve().parent.parent


def test_matplotlib_is_imported_in_its_home_only() -> None:
    importing = [
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("fastattn", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.partition(".")[0] == "matplotlib"
    ]
    assert {path for path, _ in importing} == {"fastattn/plot.py"}
    assert "matplotlib.pyplot" not in {name for _, name in importing}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_figure_has_the_same_bytes_each_time_and_no_date(tmp_path: Path, kind: str) -> None:
    import matplotlib

    before = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
    for name in ("first", "again"):
        with plot.style():
            figure = plot.new_figure(2, 1)
            figure.subplots().plot([1, 2], [3, 4], label="a line")
            plot.save(figure, tmp_path / name / f"figure.{kind}")
    first, again = ((tmp_path / name / f"figure.{kind}").read_bytes() for name in ("first", "again"))
    assert first == again
    assert b"dc:date" not in first
    assert b"Software" not in first
    assert {name: matplotlib.rcParams[name] for name in before} == before


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got 'loss.pdf', needs a name that ends with .svg or .png"):
        plot.save(None, tmp_path / "loss.pdf")


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6))
def test_logarithmic_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low * span
    ticks = plot.log_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0]
    assert ticks[-1] <= high
    assert all(len(f"{tick:.11e}".partition("e")[0].rstrip("0")) <= 5 for tick in ticks)  # such as 1.025


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.02, 1.3, [0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        (0.84, 1.55, [1, 1.2, 1.4]),
        (140, 900, [200, 400, 600, 800]),
        (20, 1500, [20, 50, 100, 200, 500, 1000]),
        (1e-3, 1e6, [1e-3, 1e-1, 1e1, 1e3, 1e5]),
    ],
)
def test_logarithmic_ticks(low: float, high: float, expected: list[float]) -> None:
    assert plot.log_ticks(low, high) == expected


def test_a_text_chart_shows_every_series_its_bounds_and_names() -> None:
    falling = [(float(x), 8.0 - x / 10) for x in range(51)]
    chart = plot.text_chart({"training": falling, "validation": [(0.0, 8.0), (50.0, 3.0)]}, "loss over steps")
    lines = chart.splitlines()
    assert lines[0].startswith("8 |o")
    assert lines[9].startswith("3 |")
    assert lines[9].endswith("o")
    assert lines[11].split() == ["0", "50"]
    assert lines[12].strip() == "loss over steps (. training, o validation)"
    columns = [line.rindex(".") for line in lines[1:9]]
    assert columns == sorted(columns)
    assert max(map(len, lines)) <= 80
    assert chart.isascii()


@pytest.mark.parametrize("points", [[(3.0, 2.5)], [(1.0, 2.0), (2.0, 2.0)]])
def test_a_text_chart_of_one_value_has_its_mark(points: list[tuple[float, float]]) -> None:
    assert plot.text_chart({"a": points, "b": []}, "x").count(".") >= len(points)


TOKENS = ["[CLS]", "a b", "$x$", "\n", "[SEP]"]


def weights(layers: int = 2, heads: int = 3, queries: int = 5, keys: int = 5) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, heads, queries, keys).softmax(-1) for _ in range(layers))


def drawn(monkeypatch: pytest.MonkeyPatch, *given: Any, **options: Any) -> Any:
    """The figure that plot_attention saves."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    fastattn.plot_attention(*given, **options)
    return figures[0]


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({}, [(i, j) for i in range(2) for j in range(3)]),
        ({"layer": 1}, [(1, 0), (1, 1), (1, 2)]),
        ({"layer": -1, "head": 2}, [(1, 2)]),
        ({"layer": [1, 0], "head": (0, -1)}, [(1, 0), (1, 2), (0, 0), (0, 2)]),
    ],
)
def test_attention_maps_show_the_weights_over_the_tokens(
    options: dict[str, Any], titles: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attentions = weights()
    figure = drawn(monkeypatch, attentions, TOKENS, **options)
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in maps] == [f"layer {i}, head {j}" for i, j in titles]
    for axes, (i, j) in zip(maps, titles):
        assert (torch.from_numpy(axes.images[0].get_array().data) == attentions[i][0, j]).all()
        assert axes.images[0].get_clim() == (0, 1)
    shown = ["[CLS]", "a\N{OPEN BOX}b", r"\$x\$", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "[SEP]"]
    assert [text.get_text() for text in maps[-1].get_xticklabels()] == shown
    assert [text.get_text() for text in maps[0].get_yticklabels()] == shown


def test_queries_of_a_step_are_the_last_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, weights(1, 1, queries=2), TOKENS)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()][-1] == "[SEP]"
    assert len(figure.axes[0].get_yticklabels()) == 2


@pytest.mark.parametrize("queries", [2, 5, 8])
def test_maps_of_cross_attention_have_the_queries_own_names(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [f"t{i}" for i in range(queries)]
    figure = drawn(monkeypatch, weights(2, 1, queries=queries), TOKENS, query_tokens=targets)
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [text.get_text() for text in maps[0].get_yticklabels()] == targets
    assert len(maps[-1].get_xticklabels()) == len(TOKENS)
    assert maps[0].images[0].get_array().shape == (queries, len(TOKENS))


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_attention_maps_are_written_in_both_formats(tmp_path: Path, kind: str) -> None:
    path = fastattn.plot_attention(weights(1, 2)[0], [*TOKENS[:4], "x" * 20], path=tmp_path / f"maps.{kind}")
    assert path.read_bytes().startswith(b"<?xml" if kind == "svg" else b"\x89PNG")


def test_labels_stand_within_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (TOKENS, ["x" * 20] * 5):
        figure = drawn(monkeypatch, weights(), names)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert min(box.x0, box.y0) >= 0, names
        assert box.x1 <= figure.get_figwidth(), names
        assert box.y1 <= figure.get_figheight(), names


@pytest.mark.parametrize(
    ("given", "options", "error", "complaint"),
    [
        ((weights(), TOKENS[:4]), {}, ValueError, "tokens: got 4, needs one for each of the 5 keys"),
        ((weights(), "abcde"), {}, TypeError, "tokens: needs a list of texts"),
        ((weights(), TOKENS), {"layer": 2}, ValueError, "layer: got 2, needs -2 to 1"),
        ((weights(), TOKENS), {"head": -4}, ValueError, "head: got -4, needs -3 to 2"),
        ((weights(), TOKENS), {"head": "1"}, TypeError, "head: got '1', needs an integer or a list"),
        ((weights(), TOKENS), {"layer": []}, ValueError, "layer: got an empty list"),
        ((weights(), TOKENS), {"path": "maps.pdf"}, ValueError, "path: got 'maps.pdf', needs a name"),
        ((None, TOKENS), {}, TypeError, "attentions: needs a tensor for each layer"),
        (((torch.ones(2, 3, 5, 5),), TOKENS), {}, ValueError, r"attentions\[0\]: got shape \(2, 3, 5, 5\)"),
        (
            (weights(1, 1, 6, 5), TOKENS),
            {},
            ValueError,
            "query_tokens: got None, needs the texts of the 6 queries",
        ),
        (
            (weights(), TOKENS),
            {"query_tokens": TOKENS[:4]},
            ValueError,
            "query_tokens: got 4, needs one for each of",
        ),
        ((weights(), TOKENS), {"query_tokens": "abcde"}, TypeError, "query_tokens: needs a list of texts"),
    ],
)
def test_maps_that_cannot_be_drawn_are_named(
    given: Any,
    options: dict[str, Any],
    error: type[Exception],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=complaint):
        fastattn.plot_attention(*given, **options)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'fastattn\[plot\]'"):
        fastattn.plot_attention(weights(), TOKENS)


def test_naming_plot_attention_imports_no_matplotlib() -> None:
    script = "import sys, fastattn; fastattn.plot_attention; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
