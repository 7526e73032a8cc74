"""The compile table: up to date with kernels and tiles, clean, and what the compiler makes of a sample of it today."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import compile_record
import pytest
from attention_cases import SMALL_TILE, UNEVEN_TILE
from attention_launches import launches_of
from compile_entries import Entry, call_with, entries, key_of
from compile_inspect import Report
from compile_matrix import Made, problem, stale, write
from compile_record import DOCUMENT, REGENERATE, fingerprint, load, render, report_of, row_key

from fastattn.kernels.attention_fwd import attention_fwd_kernel

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("recorded_triton")


def compiling(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    """Run Python in a process that doesn't interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )


def compile_matrix(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    """Run the matrix."""
    return compiling(str(HERE / "compile_matrix.py"), *arguments, python=python)


PASSES = "--kernel forward --kernel dkdv --kernel dq"
SAMPLES = {
    "ampere": (3, f"--arch 80 --bits 16 --features causal --size 64 {PASSES}"),
    "hopper": (3, f"--arch 90 --bits 16 --features causal --size 128 {PASSES}"),
    "hopper, all": (1, "--arch 90 --bits 16 --features all --size 128 --kernel dq"),
    "small blackwell, all": (1, "--arch 120 --bits 16 --features all --size 128 --kernel forward"),
    "blackwell": (1, "--arch 100 --bits 16 --features causal --size 128 --kernel dkdv"),
    "amd": (3, f"--arch gfx942 --bits 16 --features causal --size 64 {PASSES}"),
}
END_OF_SAMPLE = "-- returned "


@pytest.fixture(scope="module")
def samples() -> dict[str, str]:
    """What the matrix prints of each sample and returns, all from one process."""
    commands = [arguments.split() for _, arguments in SAMPLES.values()]
    done = compiling(
        "-c",
        f"""
from compile_matrix import main
for command in {commands}:
    print({END_OF_SAMPLE!r} + str(main(command)), flush=True)
""",
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(rf"(.*?{END_OF_SAMPLE}\d)\n", done.stdout, re.DOTALL)
    return dict(zip(SAMPLES, printed, strict=True))


@pytest.mark.newer_triton
@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_still_compiles_as_recorded(samples: dict[str, str], name: str) -> None:
    """No new spills, shared memory within the limit, wgmma on Hopper."""
    count, _ = SAMPLES[name]
    assert f"{count} compiled, 0 with problems\n{END_OF_SAMPLE}0" in samples[name], samples[name]


# Rows that must not spill and do under a Triton that is not the table's: (name, Triton's major.minor) -> why that is
# taken. By the cycle model, in cycles for 64 x 128 scores with the spills: what the tile is faster than.
TAKEN = {
    ("sm_90 16-bit D128 dkdv [plain]", "3.6"): "2591; 64x128 has 3440 and 16 spills, 32x128 4124 and none",
    ("sm_90 16-bit D128 dkdv [causal, window, lengths, sinks]", "3.6"): "3568; 64x128 has 4338 and 16 spills",
    ("sm_90 16-bit D128 dkdv [causal, packed]", "3.6"): "3505; 64x128 has 4321 and 12 spills",
}
SPILL = re.compile(
    r"^(\w+ \d+-bit \S+ \w+ \[.*?\]) .*<- \d+ loads and stores of local memory, none", re.MULTILINE
)


def spilling(printed: str) -> set[str]:
    """The rows that the matrix printed as spilling although they must not."""
    return set(SPILL.findall(printed))


def taken(triton: str) -> set[str]:
    """The rows whose spills are taken under a version of Triton."""
    return {name for name, version in TAKEN if triton.split(".")[:2] == version.split(".")}


def test_what_is_taken_under_another_triton_are_rows_that_must_not_spill() -> None:
    """None of them in the table itself; and the printed line of one is read back."""
    by_name = {entry.name: entry for entry in entries()}
    for name, _ in TAKEN:
        assert by_name[name].strict
        assert report_of(load()["rows"][name]).local_ops == 0
        wrong = problem(by_name[name], Report(local_ops=12))
        assert spilling(f"{name:66} 64x64 4w 2s TMA reg 255 local 12  <- {wrong}\n") == {name}
        assert spilling(f"{name:66} 64x64 4w 2s TMA reg 255 local  0\n") == set()
    assert len(taken("3.6.0")) == len(TAKEN)
    assert taken("3.60.0") == taken("3.9.0") == set()


@pytest.mark.newer_triton
@pytest.mark.exhaustive
def test_no_row_spills_under_another_triton_that_must_not() -> None:
    """OTHER_TRITON names a Python with fastattn and another Triton, whose register allocation is not this one's.

    What is taken by name has to spill: a name that is not needed any more fails too.
    """
    other = os.environ.get("OTHER_TRITON")
    if not other:
        pytest.skip("OTHER_TRITON names no Python")
    version = compiling("-c", "import triton; print(triton.__version__)", python=other).stdout.strip()
    arguments = "--strict --bits 16 --kernel forward --kernel dkdv --kernel dq --arch 80 --arch 90 --arch 100"
    done = compile_matrix(*arguments.split(), python=other)
    expected = taken(version)
    assert spilling(done.stdout) == expected, done.stdout + done.stderr
    assert f", {len(expected)} with problems" in done.stdout, done.stdout + done.stderr


def test_the_table_is_that_of_the_kernels_and_tiles_in_use() -> None:
    table = load()
    outdated = [entry.name for entry in stale(entries(), table)]
    assert not outdated, f"{len(outdated)} rows are out of date, run {REGENERATE}: {outdated[:5]} ..."
    assert set(table["rows"]) == {entry.name for entry in entries()}


def test_every_row_of_the_table_is_clean() -> None:
    table = load()
    wrong = [(entry.name, problem(entry, report_of(table["rows"][entry.name]))) for entry in entries()]
    assert [each for each in wrong if each[1] is not None] == []


def test_the_page_is_that_of_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(load(), entries()), f"run {REGENERATE}"


def entry(**changes: object) -> Entry:
    defaults = {"arch": "90", "bits": 16, "size": 128, "kernel": "forward", "features": "causal"}
    return Entry(**(defaults | changes))


def test_problems_are_seen() -> None:
    good = Report(registers=200, shared=100_000, async_mma=8, wide_copies=8)
    assert problem(entry(), good) is None
    assert "shared memory" in problem(entry(), Report(shared=300_000, async_mma=8))
    assert "shared memory" in problem(entry(arch="89"), Report(shared=102_000))
    assert "shared memory" in problem(entry(arch="120"), Report(shared=102_000))
    assert "shared memory" in problem(entry(arch="gfx942"), Report(shared=65_537))
    assert "local memory" in problem(entry(), Report(local_ops=3, async_mma=8))
    assert "wgmma" in problem(entry(), Report(shared=100_000))
    assert "16 bytes" in problem(entry(), Report(async_mma=8))
    assert problem(entry(), Report(async_mma=8, tma_copies=8)) is None
    assert problem(entry(arch="80"), Report(wide_copies=8)) is None
    assert problem(entry(size=256), Report(local_ops=3)) is None
    assert problem(entry(features="all"), Report(local_ops=3)) is None
    assert problem(entry(features="all"), Report(local_ops=3), allowance=3) is None
    assert "on record" in problem(entry(features="all"), Report(local_ops=4), allowance=3)
    assert problem(entry(kernel="softmax_fwd", features="plain"), Report()) is None
    assert "local memory" in problem(entry(kernel="softmax_fwd", features="all"), Report(local_ops=1))
    assert "boom" in problem(entry(), Report(error="boom"))


def test_a_change_of_tile_constant_or_architecture_makes_a_row_stale() -> None:
    call = call_with("causal", 64, 16)
    launch = launches_of(call, SMALL_TILE)["forward"]
    key = row_key(launch, "90")
    assert key == row_key(launches_of(call_with("causal", 64, 16), SMALL_TILE)["forward"], "90")
    others = [
        row_key(launch, "80"),
        row_key(launches_of(call, UNEVEN_TILE)["forward"], "90"),
        row_key(launch._replace(num_stages=3), "90"),
        row_key(launches_of(call_with("plain", 64, 16), SMALL_TILE)["forward"], "90"),
        row_key(launches_of(call_with("causal", 64, 32), SMALL_TILE)["forward"], "90"),
        row_key(launches_of(call, SMALL_TILE)["dq"], "90"),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_change_of_a_device_function_makes_its_kernels_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else does: not a comment, not a docstring, not a function that the kernel doesn't reach."""
    from fastattn.kernels import attention_weights, scores

    def sources(edit: tuple[str, str] | None = None) -> tuple[str, str]:
        fingerprint.cache_clear()
        original = compile_record.inspect.getsource

        def edited(function: object) -> str:
            source = original(function)
            return source if edit is None else source.replace(*edit)

        with monkeypatch.context() as patch:
            patch.setattr(compile_record.inspect, "getsource", edited)
            return fingerprint(attention_fwd_kernel), fingerprint(attention_weights.attention_weights_kernel)

    plain = sources()
    assert sources(("sinks + head", "sinks + 1 + head"))[0] != plain[0]
    changed_both = sources(("return scores, capped", "return scores, products"))
    assert changed_both[0] != plain[0]
    assert changed_both[1] != plain[1]
    assert sources(("One step of online softmax", "A step")) == plain
    assert sources(("# of the row", "# row")) == plain
    with monkeypatch.context() as patch:
        patch.setattr(scores, "LOG2E", type(scores.LOG2E)(1.5))
        assert sources()[0] != plain[0]
    fingerprint.cache_clear()


def test_a_row_from_the_same_code_is_not_compiled_again() -> None:
    done = compiling("-c", """
from compile_entries import entries, launch_of
from compile_matrix import make_entry
from compile_inspect import intermediate
entry = next(entry for entry in entries(["90"]) if entry.kernel == "weights")
ir = intermediate(launch_of(entry), "90")
same = make_entry(entry, {"key": "of other source", "ir": ir, "registers": 3})
assert (same.compiled, same.ir, same.report.registers) == (False, ir, 3), same
other = make_entry(entry, {"key": "of other source", "ir": "of other code", "registers": 3})
assert (other.compiled, other.ir) == (True, ir), other
assert other.report.registers > 3, other
elsewhere = intermediate(launch_of(entry)._replace(num_stages=7), "90"), intermediate(launch_of(entry), "80")
assert len({ir, *elsewhere}) == 3
""")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_writing_keeps_what_is_current_and_refuses_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton

    monkeypatch.setattr(compile_record, "STORED", tmp_path / "table.json")
    monkeypatch.setattr(compile_record, "DOCUMENT", tmp_path / "table.md")
    first, second, third = (one for one, _ in zip(entries(["90"]), range(3)))
    row = compile_record.row_of(key_of(first), "abc", Report(registers=100, shared=2048))
    before = {"triton": triton.__version__, "rows": {first.name: row, "a kernel of the past": row}}
    assert stale([first, second], before) == [second]
    write(
        before, {second: Made(Report(registers=50), "def"), third: Made(Report(local_ops=9))}, wrong={third}
    )
    written = json.loads((tmp_path / "table.json").read_text())
    assert set(written["rows"]) == {first.name, second.name}
    assert report_of(written["rows"][second.name]) == Report(registers=50)
    page = (tmp_path / "table.md").read_text()
    assert "100 regs; 2 KiB" in page
    assert "50 regs; 0 KiB" in page
    outdated = {"triton": "0.0", "rows": {first.name: row}}
    write(outdated, {second: Made(Report(registers=50), "def")}, wrong=set())
    assert set(json.loads((tmp_path / "table.json").read_text())["rows"]) == {second.name}
