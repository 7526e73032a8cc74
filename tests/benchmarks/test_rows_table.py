"""`benchmarks/rows.py --write`: the choice by times, and the table that is written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fastattn.nn import rows_table
from measure import rows


def test_the_fastest_product_is_chosen_for_each_number_of_rows() -> None:
    slow, fast_alone, noise = [9.0] * 5, [1.0, 2.0, 9.0, 20.0, 40.0], [8.9] * 4 + [9.1]
    assert rows.chosen({"linear": slow}) == ((None, "linear"),)
    assert rows.chosen({"linear": slow, "packed": noise}) == ((None, "linear"),)
    assert rows.chosen({"linear": slow, "one by one": fast_alone}) == ((2, "one by one"), (None, "linear"))


def test_a_cpu_is_written_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_table.__file__ is not None
    path = tmp_path / "table.py"
    path.write_text(Path(rows_table.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    other: dict[str, rows.Choice] = {"float32": ((None, "linear"),)}
    monkeypatch.setattr(rows_table, "FASTEST", {"A": other, "B": other})
    choices: dict[str, rows.Choice] = {
        "float32": ((None, "linear"),),
        "float16": ((1, "one by one"), (None, "linear")),
    }
    rows.write(path, "B", choices)
    assert runpy.run_path(str(path))["FASTEST"] == {"A": other, "B": choices}
