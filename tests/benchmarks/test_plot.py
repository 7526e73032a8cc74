"""Tables and charts come from stored results, and the pages show exactly what the results give."""

# ruff: noqa: RUF001 - the tables are typeset
from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import plot
from fastattn import bench
from fastattn import plot as drawing
from report import charts, figures, schema, tables


def _row(provider: str, median: float, tflops: float = 1.0) -> dict[str, Any]:
    return {
        "provider": provider,
        "status": "ok",
        "time_ms": {"median": median, "p20": median * 0.9, "p80": median * 1.1, "samples": 5},
        "error": {"out": 2e-6, "dq": 1e-6},
        "within_rule": True,
        "tflops": tflops,
        "gbps": None,
        "host_ms": None,
        "ceiling_share": 0.5,
        "peak_memory_mib": 10.0 * median,
    }


def _case(
    name: str, group: str, rows: list[dict[str, Any]], target: Any = None, **params: Any
) -> dict[str, Any]:
    sizes = {"batch": 1, "heads": 12, "kv_heads": 12, "seqlen_q": 2048, "seqlen_k": 2048, "head_dim": 64}
    axis = (
        {"name": "sequence length", "value": params["seqlen_q"], "line": group} if group == "window" else None
    )
    return {
        "name": name,
        "label": f"the call {name}",
        "axis": axis,
        "group": group,
        "params": {**sizes, "causal": False, **params},
        "direction": group if group in ("forward", "backward") else "forward+backward",
        "dtype": "float32",
        "flops": 1e9,
        "bytes": None,
        "target": target,
        "rows": rows,
    }


def _store(folder: Path, kind: str, cases: list[dict[str, Any]], bench: str = "attention") -> dict[str, Any]:
    result = schema.new_result(bench, torch.device("cpu"), {})
    result["device"] |= {"kind": kind, "name": "Some Device"}
    result["cases"] = cases
    schema.save(result, folder / schema.folder_name(result["device"]) / f"{bench}.json")
    return result


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    return tmp_path


def _cpu_cases() -> list[dict[str, Any]]:
    target = {"provider": "fastattn", "against": "sdpa", "speed": 8.0, "memory": 0.25}
    window = [_case(f"w{s}", "window", [_row("fastattn", s / 1e3), _row("sdpa", s / 100)],
                    seqlen_q=s, seqlen_k=s, window=[255, 0], target=target) for s in (1024, 2048)]  # fmt: skip
    missing = {"provider": "sdpa", "status": "unavailable", "reason": "it has no softcap"}
    return [*window, _case("cap", "features", [_row("fastattn", 2.0), missing], softcap=30.0)]


def test_the_cpu_table_gives_times_ratio_target_memory_and_error(results: Path) -> None:
    _store(results, "cpu", _cpu_cases())
    short, long = (tables.table_of(name).splitlines() for name in ("headline-cpu", "attention-cpu"))
    assert short[2] == (
        "| the call w1024 | sdpa | 10.2 | 1.02 | **10.00×** | ≥ 8.0×, ≤ 0.25 mem "
        "| 1 TFLOP/s (50 %) | 10 (102) | 2.0e-06 (2.0e-06) |"
    )
    assert [line for line in long if line not in short] == [
        "| the call cap | – | – | 2 | – |  | 1 TFLOP/s (50 %) | 20 (–) | 2.0e-06 (–) |",
        "![Speed over size](../benchmarks/results/cpu/attention_length.svg)",
        "![Times the peer's speed](../benchmarks/results/cpu/attention_ratio.svg)",
    ]
    assert short[-1].startswith("Some Device, ")


def test_the_headline_joins_the_benches_and_names_their_conditions_once(results: Path) -> None:
    _store(results, "cpu", _cpu_cases())
    target = {"provider": "fastattn", "against": "torch", "speed": 1.0}
    rows = [_row("fastattn", 1.0), _row("torch", 2.0), {**_row("floor-products", 0.5), "tflops": None}]
    _store(results, "cpu", [_case("loss", "loss", rows, target)], "cross-entropy")
    lines = tables.table_of("headline-cpu").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| the call w1024", "| the call w2048", "| the call loss", "", lines[-1],
    ]  # fmt: skip
    assert "| torch | 2 | 1 | **2.00×** | ≥ 1.0× | 1 TFLOP/s (50 %), products 0.5 ms |" in lines[4]


def test_the_table_of_overhead_is_in_microseconds_of_the_host(results: Path) -> None:
    ours, other = _row("fastattn", 0.075), {**_row("fastattn-sdpa", 0.05), "host_ms": 0.02}
    _store(results, "cpu", [_case("call", "call", [ours, other, _row("sdpa", 0.005)])], "overhead")
    lines = tables.table_of("overhead-cpu").splitlines()
    assert lines[2:4] == [
        "| the call call | sdpa | 5 | 75 | **70** |",
        "| the call call (`sdpa`) | sdpa | 5 | 20 | **15** |",
    ]


def test_where_launches_are_counted_the_table_says_what_each_costs(results: Path) -> None:
    rows = [_row("fastattn", 1.0), _row("sdpa", 1.0), _row("flex", 1.0)]
    for row, host, number in zip(rows, (0.02, 0.03, 0.04), (4, 3, None)):
        row |= {"host_ms": host} | ({"launches": number} if number else {})
    _store(results, "cpu", [_case("call", "call", rows)], "overhead")
    lines = tables.table_of("overhead-cpu").splitlines()
    assert lines[2:4] == [
        "| the call call | sdpa | 30 (3 launches, 10.0 each) | 20 (4 launches, 5.0 each) | **-10** |",
        "| the call call | flex | 40 |  |  |",
    ]


def test_the_table_of_swaps_ends_with_the_median_and_what_is_missing(results: Path) -> None:
    ran = [_case(f"c{n}", "swap", [_row("fastattn", 1.0), _row("as it was", float(n))]) for n in (2, 3, 4)]
    gone = _case("gone", "swap", [{"provider": "fastattn", "status": "unavailable", "reason": "no"}])
    _store(results, "cpu", [*ran, gone], "swap")
    assert tables.table_of("swap-cpu").splitlines()[7] == (
        "Median speed of the 3 cases measured: **3.00×** (target ≥ 1.0×). Not measured: `gone`."
    )


def test_the_gpu_table_gives_the_grid_with_ratios(results: Path) -> None:
    rows = [_row("fastattn-triton", 2.0, tflops=400.0), _row("sdpa-cudnn", 1.0), _row("sdpa-flash", 4.0)]
    cases = [
        _case("a", "forward", rows, causal=True, seqlen_q=512),
        _case("b", "forward", rows, seqlen_q=1024),
    ]
    _store(results, "cuda", cases)
    table = tables.table_of("attention-gpu")
    assert "| causal, 64 | 400 (0.50) | – |\n| full, 64 | – | 400 (0.50) |" in table


@pytest.mark.parametrize(("language", "text"), [("en", "Not measured yet."), ("zh", "尚未测量。")])
def test_what_was_not_measured_is_said_to_be_so(results: Path, language: str, text: str) -> None:
    assert tables.table_of("attention-gpu", language) == text + "\n"
    assert tables.table_of("attention-cpu", language) == text + "\n"


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table is called 'nothing'"):
        tables.table_of("nothing")


def test_pages_are_rewritten_between_their_markers_only(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- benchmarks:attention-gpu:start -->\nold\n<!-- benchmarks:attention-gpu:end -->\nafter\n"
    )
    assert charts.stale_pages(tmp_path) == ["README.md"]
    page.write_text(charts.refreshed(page), encoding="utf-8")
    assert charts.stale_pages(tmp_path) == []
    assert page.read_text(encoding="utf-8") == (
        "before\n<!-- benchmarks:attention-gpu:start -->\nNot measured yet.\n"
        "<!-- benchmarks:attention-gpu:end -->\nafter\n"
    )


def test_charts_are_drawn_and_say_where_they_come_from(tmp_path: Path) -> None:
    grid = [_case(f"{d}{s}{c}", d, [_row("fastattn-triton", 2.0), _row("sdpa-flash", 1.0)], causal=c, seqlen_q=s)
            for d in ("forward", "backward") for s in (512, 1024) for c in (True, False)]  # fmt: skip
    result = _store(tmp_path, "cpu", [*_cpu_cases(), *grid])
    drawn = charts.draw(result, tmp_path)
    names = ["attention_forward.svg", "attention_backward.svg", "attention_length.svg", "attention_ratio.svg"]
    assert [chart.name for chart in drawn] == names
    for chart in drawn:
        assert tables.conditions(result) in chart.read_text(encoding="utf-8")
    result["cases"] = result["cases"][-2:]
    first, again = (charts.draw(result, tmp_path / name)[0].read_bytes() for name in ("first", "again"))
    assert first == again


def test_a_rate_is_drawn_where_memory_bounds_the_calls(tmp_path: Path) -> None:
    cases = _cpu_cases()[:2]
    for case in cases:
        case |= {"bytes": 1e6, "flops": None}
        for row in case["rows"]:
            row |= {"gbps": 3.0, "tflops": None}
    result = _store(tmp_path, "cuda", cases, "decode")
    text = charts.draw(result, tmp_path)[0].read_text(encoding="utf-8")
    assert "GB/s" in text
    assert "TFLOP/s" not in text


def _drawn(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a result, laid out."""
    with drawing.style():
        figures_of = {"ratio": charts._ratio_figure, "length": charts._length_figure}
        names = figures.chart_names(result)
        made = {
            n: figures_of[n](result) if n in figures_of else charts._grid_figure(result, n) for n in names
        }
        for figure in made.values():
            figure.savefig(io.BytesIO(), format="png")
    return made


def test_charts_hold_the_figures_of_the_result(results: Path) -> None:
    result = _store(results, "cpu", _cpu_cases())
    made = _drawn(result)
    (bars,) = made["ratio"].axes
    ratios = figures.ratios_of(result)
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars.patches] == [
        (1.0, r) for _, r, _ in ratios
    ]
    assert [text.get_text() for text in bars.texts] == [f"{r:.2f}×" for _, r, _ in ratios]
    assert "the target" in bars.get_xlabel()
    (lines,) = made["length"].axes
    shown = {c.get_label(): [tuple(point) for point in c.lines[0].get_xydata()] for c in lines.containers}
    assert shown == {"fastattn": [(1024, 1.024), (2048, 2.048)], "sdpa": [(1024, 10.24), (2048, 20.48)]}
    assert (lines.get_xlabel(), lines.get_ylabel()) == ("sequence length", "time (ms)")


def test_the_legend_of_a_grid_covers_no_bar(results: Path) -> None:
    rows = [_row("fastattn-triton", 2.0, 600.0), _row("sdpa-flash", 1.0, 610.0)]
    grid = [_case(f"f{s}", "forward", rows, seqlen_q=s) for s in (512, 1024)]
    figure = _drawn(_store(results, "cuda", grid))["forward"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fastattn-triton", "sdpa-flash"]
    panel = figure.axes[0].get_tightbbox()
    assert not legend.get_window_extent().overlaps(panel)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [600.0, 600.0, 610.0, 610.0]


def test_a_ratio_below_one_is_a_bar_to_the_left_and_no_target_is_named_without_one(results: Path) -> None:
    case = _case("slow", "features", [_row("fastattn", 2.0), _row("sdpa", 1.0)])
    (axis,) = _drawn(_store(results, "cpu", [case]))["ratio"].axes
    assert (axis.patches[0].get_x(), axis.patches[0].get_width()) == (1.0, -0.5)
    assert axis.get_xlabel() == "times the peer's speed"


def test_another_dtype_is_another_line(results: Path) -> None:
    cases = [*_cpu_cases()[:2], _cpu_cases()[1] | {"dtype": "bfloat16"}]
    assert [len(line) for line in figures.lines_of({"cases": cases}).values()] == [2]
    cases.append(_cpu_cases()[0] | {"dtype": "bfloat16"})
    assert list(figures.lines_of({"cases": cases})) == ["window", "window, bfloat16"]


@pytest.mark.parametrize("file", tables.result_files(), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_text_of_a_chart_overlaps_another_or_leaves_the_figure(file: Path) -> None:
    for figure in _drawn(schema.load(file)).values():
        boxes = []
        for axis in figure.axes:
            texts = [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
            for along in (axis.xaxis, axis.yaxis):
                low, high = sorted(along.get_view_interval())
                texts += [tick.label1 for tick in along.get_major_ticks() if low <= tick.get_loc() <= high]
            assert len(axis.get_xticks()) >= 2
            assert len(axis.get_yticks()) >= 1
            boxes += [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
        for index, (text, box) in enumerate(boxes):
            assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1, text
            assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1, text
            assert [other for other, where in boxes[index + 1 :] if where.overlaps(box)] == [], text


def test_stale_charts_are_named(results: Path) -> None:
    result = _store(results, "cpu", _cpu_cases())
    names = ["cpu/attention_length.svg", "cpu/attention_ratio.svg"]
    assert charts.stale_charts() == names
    charts.draw(result, results / "cpu")
    (results / "cpu" / "softmax_ratio.svg").write_text("of a bench that has no result")
    assert charts.stale_charts() == ["cpu/softmax_ratio.svg"]
    result["date"] = "2020-01-01T00:00:00Z"
    schema.save(result, results / "cpu" / "attention.json")
    assert charts.stale_charts() == [*names, "cpu/softmax_ratio.svg"]
    charts.update_docs(results)
    assert charts.stale_charts() == []


def test_the_pages_and_charts_of_this_repository_are_fresh() -> None:
    stale = [*tables.stale_pages(), *charts.stale_charts()]
    assert stale == [], "run: python benchmarks/plot.py --update-docs"


def test_every_bench_has_its_tables_on_the_page() -> None:
    page = (schema.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = {found[1] for found in tables.MARKER.findall(page)}
    tables_of = {f"{name}-{kind}" for name in bench.NAMES for kind in ("cpu", "gpu")}
    assert shown - {"headline-cpu"} == tables_of - {"serve-gpu"}  # whose cases are of a CPU
    assert list(tables.BENCHES) == list(bench.NAMES)
    assert f'format, version   "{schema.FORMAT}", {schema.VERSION}' in page


@pytest.mark.parametrize("file", tables.result_files(), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_stored_results_are_valid_and_in_their_place(file: Path) -> None:
    result = schema.load(file)
    assert file.parent.name == schema.folder_name(result["device"])
    assert file.stem == result["bench"]
    assert result["bench"] in bench.NAMES
    assert not result["settings"]["quick"]
    assert not [row for case in result["cases"] for row in case["rows"] if row["provider"].startswith("fastattn")
                and row["status"] != "ok" and result["device"]["kind"] == "cpu"]  # fmt: skip


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
def test_a_result_that_cannot_be_read_is_a_line(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(file), "--out", str(tmp_path / "charts")])
    assert plot.main() == 2
    assert capsys.readouterr().err.startswith("plot.py: ")
    assert not (tmp_path / "charts").exists()
