"""The cycle model's figures on file: of the kernels in use, refused where they get worse, and a few made today."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cycles_page
import cycles_record
import pytest
from compile_record import DOCUMENT
from cycles_record import (
    REGENERATE,
    WORSE,
    baseline_of,
    cell,
    cuda_line,
    jobs,
    key_of,
    load,
    load_baseline,
    merged,
    refused,
    stale,
    triton_entries,
)

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("recorded_triton")
ROWS = [  # recomputed here
    "sm_90 16-bit D128 forward [causal]", "sm_90 16-bit D128 dkdv [plain]", "sm_90 16-bit D64 dq [plain]",
]  # fmt: skip


def test_the_cycles_on_file_are_of_the_kernels_and_the_model_in_use() -> None:
    outdated = stale(jobs(), load()["rows"])
    assert not outdated, f"{len(outdated)} are out of date, run {REGENERATE}: {outdated[:5]} ..."
    assert {row["job"][1] for row in load()["rows"].values()} == {name for _, name in jobs()}


def test_every_16_bit_row_of_hopper_and_every_cuda_kernel_has_cycles() -> None:
    rows = load()["rows"]
    page = DOCUMENT.read_text(encoding="utf-8")
    lines = page.splitlines()
    tables = {part.split("\n")[0]: part.splitlines() for part in page.split("\n## ")}
    assert set(triton_entries()) <= set(rows)
    for name, row in rows.items():
        assert row["cycles"] > 0
        assert row["bound"] in ("tensor core", "MUFU", "issue", "shared memory")
        assert 0 < row["share"] <= 1.01
        if row["job"][0] == "cuda":
            assert lines.count(cuda_line(name, row)) == 1, name
        else:
            entry = triton_entries()[name]
            begin = f"| {entry.bits} | {entry.size} | {entry.features} |"
            (line,) = (line for line in tables[entry.kernel] if line.startswith(begin))
            assert f"; {cell(name, rows)} |" in line, name


def test_a_cuda_kernel_is_the_same_in_both_types() -> None:
    """As many instructions in the loop, no spills, and no other cycles than the model's noise."""
    rows = load()["rows"]
    names = [name for name in rows if name.startswith("cuda bfloat16 ")]
    assert len(names) > 20
    assert len(names) == sum(name.startswith("cuda float16 ") for name in rows)
    for name in names:
        row, half = rows[name], rows[name.replace("bfloat16", "float16")]
        for figure in ("instructions", "registers", "spills", "bound"):
            assert row[figure] == half[figure], (name, figure)
        assert abs(half["cycles"] / row["cycles"] - 1) < WORSE - 1, name


def test_the_tables_of_the_page_on_hopper_are_those_of_the_cycles_on_file() -> None:
    page = cycles_page.PAGE.read_text(encoding="utf-8")
    assert page == cycles_page.updated(page, load()["rows"], triton_entries().values()), f"run {REGENERATE}"


def test_what_the_page_quotes_is_on_file() -> None:
    """Also outside its tables."""
    rows = load()["rows"]
    page = " ".join(cycles_page.PAGE.read_text(encoding="utf-8").split())
    assert [words for words in cycles_page.quotations(rows) if words not in page] == []
    changed = {name: row | {"cycles": row["cycles"] + 1} for name, row in rows.items()}
    assert [words for words in cycles_page.quotations(changed) if words in page] == []


def test_every_cuda_kernel_of_the_backward_without_softcap_is_in_its_table() -> None:
    rows = load()["rows"]
    lines = cycles_page.backward(rows).splitlines()[2:]
    kernels = [name for name in rows if re.match(r"cuda bfloat16 D\d+ (dkdv|dq|backward) \d+x\d+$", name)]
    assert len(lines) == len(kernels) + 3  # and the two passes together
    for name in kernels:
        more = {name: rows[name] | {"cycles": rows[name]["cycles"] + 100}}
        changed = cycles_page.backward(rows | more).splitlines()[2:]
        assert 2 <= sum(a != b for a, b in zip(changed, lines)) <= 3 or name.split()[3] == "backward"
        assert changed != lines


def test_no_row_by_tma_is_slower_than_the_tile_in_its_place() -> None:
    """With no combination of features that is compiled: that tile is the one from before TMA."""
    rows = load()["rows"]
    pairs = [(name, cycles_page.without(name)) for name in rows if cycles_page.without(name) in rows]
    assert len(pairs) > 40
    slower = {
        name: (rows[other]["cycles"], rows[name]["cycles"])
        for name, other in pairs
        if rows[name]["cycles"] > WORSE * rows[other]["cycles"]
    }
    assert slower == {}


def test_every_peer_has_one_of_ours_beside_it() -> None:
    rows = load()["rows"]
    lines = cycles_page.peers(rows).splitlines()[2:]
    assert len(lines) == len(cycles_page.PEERS)
    for line, (_, direction) in zip(lines, cycles_page.PEERS):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2], line
        assert bool(cells[3]) == (direction != "backward"), line
    changed = {name: row | {"cycles": row["cycles"] + 1} for name, row in rows.items()}
    assert all(line not in lines for line in cycles_page.peers(changed).splitlines()[2:])


def test_a_page_without_a_section_is_refused() -> None:
    with pytest.raises(ValueError, match="no section 'cycles of the backward'"):
        cycles_page.updated("# A page", load()["rows"], triton_entries().values())


@pytest.mark.newer_triton
def test_a_few_rows_give_what_is_on_file() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import json, sys; from cycles_record import make; "
    code += "print(json.dumps([make(('triton', name)) for name in sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *ROWS],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = load()["rows"]
    for made in json.loads(done.stdout):
        for name, row in made.items():
            assert row == rows[name]


def row(cycles: int, job: tuple[str, str] = ("triton", ROWS[0])) -> dict[str, object]:
    return {"job": list(job), "key": key_of(job), "cycles": cycles, "bound": "issue", "share": 0.5}


def test_a_row_that_gets_worse_is_refused_unless_it_is_named() -> None:
    name = ROWS[0]
    before, worse, noise = {name: row(1000)}, {name: row(1031)}, {name: row(1030)}
    kept = {name: 1000}
    assert list(refused(kept, worse, ())) == [name]
    assert refused(kept, worse, (name,)) == {}
    assert list(refused(kept, worse, ("another",))) == [name]
    assert refused(kept, noise, ()) == {}
    assert refused({}, worse, ()) == {}
    assert merged(before, worse, {name})[name]["cycles"] == 1000
    assert merged(before, worse, ())[name]["cycles"] == 1031


def test_small_losses_do_not_add_up() -> None:
    """What is kept of a row is the fewest cycles that it has had, until a loss is accepted by name."""
    name = ROWS[0]
    kept = baseline_of({}, {name: row(1000)}, ())
    for cycles in (990, 1010):
        assert refused(kept, {name: row(cycles)}, ()) == {}
        kept = baseline_of(kept, {name: row(cycles)}, ())
    assert kept == {name: 990}
    assert list(refused(kept, {name: row(1021)}, ())) == [name]  # 1.1 % above the last one
    assert baseline_of(kept, {name: row(1021)}, (name,)) == {name: 1021}
    assert baseline_of(kept | {"of the past": 5}, {name: row(1021)}, ()) == {name: 990}


def test_no_row_on_file_has_drifted_from_its_baseline() -> None:
    rows, kept = load()["rows"], load_baseline()
    assert set(kept) == set(rows), f"run {REGENERATE}"
    drifted = {
        name: (kept[name], row["cycles"]) for name, row in rows.items() if row["cycles"] > WORSE * kept[name]
    }
    assert drifted == {}


def test_rows_of_kernels_of_the_past_are_dropped() -> None:
    kept = merged({"old": row(5) | {"job": ["triton", "a row of the past"]}, ROWS[0]: row(1000)}, {}, ())
    assert set(kept) == {ROWS[0]}


def test_other_code_or_another_model_makes_a_row_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    job = ("triton", ROWS[0])
    rows = {ROWS[0]: row(1000)}
    assert stale([job], rows) == []
    assert stale([job], {ROWS[0]: rows[ROWS[0]] | {"key": "of other code"}}) == [job]
    key_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cycles_record, "model_key", lambda: "another model")
        assert stale([job], rows) == [job]
    key_of.cache_clear()


@pytest.mark.slow
def test_writing_refuses_a_worse_row_and_accepts_only_known_names(tmp_path: Path) -> None:
    """The command itself, on a file that says that a row was faster."""
    code = """
import contextlib, io, json, sys
from pathlib import Path
import cycles_page, cycles_record, compile_record
stored, page, name = sys.argv[1:]
cycles_record.STORED, compile_record.DOCUMENT = Path(stored), Path(page)
cycles_record.BASELINE = Path(stored + ".kept")
cycles_page.PAGE = Path(page + ".hopper")
cycles_page.updated = lambda page, rows, entries: f"{page}{len(rows)} rows"
only = [("triton", name)]
cycles_record.jobs = lambda: only
runs = []
for arguments in ([], ["--accept-cycles", "another"], ["--accept-cycles", name]):
    sys.argv[1:] = ["--write", "-j", "1", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            returned = cycles_record.main()
        except SystemExit as refusal:
            returned = refusal.code
    kept, cycles = json.loads(cycles_record.BASELINE.read_text()), cycles_record.load()["rows"][name]["cycles"]
    runs.append([returned, said.getvalue(), kept[name], cycles])
print(json.dumps(runs))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    import triton

    stored, name = tmp_path / "cycles.json", ROWS[2]
    faster = load()["rows"][name] | {"cycles": 10, "key": "of other code"}
    stored.write_text(json.dumps({"triton": triton.__version__, "rows": {name: faster}}))
    (tmp_path / "cycles.json.kept").write_text(json.dumps({name: 9}))
    page = tmp_path / "page.md.hopper"
    page.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", code, str(stored), str(tmp_path / "page.md"), name],
        capture_output=True, text=True, check=False, cwd=HERE, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused_run, unknown, accepted = json.loads(done.stdout)
    assert (refused_run[0], *refused_run[2:]) == (1, 9, 10), refused_run
    assert "the fewest on file are 9" in refused_run[1]
    assert "no row on file" in unknown[0]
    assert unknown[2:] == [9, 10]
    returned, said, kept, cycles = accepted
    assert returned == 0, said
    assert kept == cycles
    assert cycles >= 768  # its products alone
    assert page.read_text().endswith("1 rows")
