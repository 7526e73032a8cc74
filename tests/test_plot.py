"""The home of matplotlib: the same bytes every time, round ticks, text charts, and no import of it elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn import plot

ROOT = Path(__file__).resolve().parent.parent


def test_matplotlib_is_imported_in_its_home_only() -> None:
    importing = [
        path.relative_to(ROOT).as_posix()
        for folder in ("fastattn", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.partition(".")[0] == "matplotlib"
    ]
    assert set(importing) == {"fastattn/plot.py"}
    assert "pyplot" not in (ROOT / "fastattn" / "plot.py").read_text(encoding="utf-8").partition('"""\n')[2]


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
    with pytest.raises(ValueError, match=r"path: got loss.pdf, needs a name that ends with .svg or .png"):
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
    chart = plot.text_chart(
        {"training": falling, "validation": [(0.0, 8.0), (50.0, 3.0)]}, "loss over steps", height=6
    )
    lines = chart.splitlines()
    assert lines[0].startswith("8 |o")
    assert lines[5].startswith("3 |")
    assert lines[5].endswith("o")
    assert lines[7].split() == ["0", "50"]
    assert lines[8].strip() == "loss over steps (. training, o validation)"
    columns = [line.rindex(".") for line in lines[1:5]]
    assert columns == sorted(columns)
    assert max(map(len, lines)) <= 80
    assert chart.isascii()


@pytest.mark.parametrize("points", [[(3.0, 2.5)], [(1.0, 2.0), (2.0, 2.0)]])
def test_a_text_chart_of_one_value_has_its_mark(points: list[tuple[float, float]]) -> None:
    assert plot.text_chart({"a": points, "b": []}, "x").count(".") >= len(points)
