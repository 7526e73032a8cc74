"""`fastattn bench model` and `bench tune --model`: what they choose, print and refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn.cli import app
from fastattn.kernels import tuned
from fastattn.tune import ahead, extension, model
from fastattn.tune.cycles.report import Prediction
from fastattn.tune.plan import Candidate, Work

WORK = Work("forward", "bfloat16", 128, 128)
MADE = Prediction("name", "forward", 128, 2000.0, 1024.0, "issue", 0.5, 500.0, 200, 0, 300, 2)


def bench(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Triton's compiler: larger tiles take fewer cycles, two stages spill, four don't compile."""

    def predicted(work: Work, tile: model.Tile) -> Prediction:
        if tile.num_stages == 4:
            raise RuntimeError("out of shared memory")
        cycles = 1e7 / (tile.block_m * tile.block_n) + tile.num_warps
        return replace(
            MADE, name=str(work), direction=work.kernel, cycles=cycles, spills=4 * (tile.num_stages == 2)
        )

    monkeypatch.setattr(ahead, "why_not", lambda: None)
    monkeypatch.setattr(ahead, "predict_work", predicted)
    monkeypatch.setattr(extension, "why_not", lambda: "needs a CUDA toolkit with nvcc")


@pytest.mark.usefixtures("compiler")
def test_kernels_are_chosen_by_options_and_printed_with_their_source() -> None:
    status, out, _ = bench("model", "--head-dim", "128", "--direction", "dq", "--direction", "dkdv", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["source"] == "model"
    assert {each["direction"] for each in report["kernels"]} == {"dq", "dkdv"}
    status, out, _ = bench("model", "--head-dim", "64", "--direction", "forward", "--features", "causal")
    assert (status, "not a measurement" in " ".join(out.split())) == (0, True)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--head-dim", "65"), "--head-dim: got 65"),
        (("--direction", "sideways"), "--direction: got 'sideways'"),
        (("--backend", "torch"), "--backend: got 'torch'"),
        (("--features", "colour"), "--features: got 'colour'"),
        (("--backend", "cuda"), "needs a CUDA toolkit"),
        (("--direction", "backward"), "no kernel matches"),
        (("--rows", "64"), "--function and --rows go with --cubin"),
    ],
)
def test_what_cannot_be_modelled_is_refused(arguments: tuple[str, ...], words: str) -> None:
    status, _, err = bench("model", *arguments)
    assert status == 2
    assert words in err


def test_a_file_that_is_no_cubin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cubin"
    path.write_text("no machine code")
    status, _, err = bench("model", "--cubin", str(path))
    assert (status, "not a cubin" in err) == (2, True)


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "why_not", lambda: "needs triton")
    assert "needs triton" in bench("tune", "--model")[2]
    assert "needs triton" in bench("model", "--backend", "triton")[2]


@pytest.mark.usefixtures("compiler")
def test_candidates_are_ranked_by_cycles_and_those_that_spill_come_after() -> None:
    tiles = [
        model.Tile(64, 64, 4, 1),
        model.Tile(128, 128, 8, 2),
        model.Tile(128, 64, 8, 1),
        model.Tile(128, 64, 8, 4),
    ]
    ranked = model.rank(
        WORK, [*map(Candidate, tiles), Candidate(model.Tile(128, 128, 4, 4), "needs more registers")]
    )
    assert [each.tile for each in ranked[:3]] == [tiles[2], tiles[0], tiles[1]]
    assert [each.reason for each in ranked[3:]] == [
        "RuntimeError: out of shared memory",
        "needs more registers",
    ]


@pytest.mark.usefixtures("compiler")
def test_a_ranking_stores_nothing_and_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "store", lambda *_: pytest.fail("a model's tiles were stored as measured"))
    arguments = ("--model", "--quick", "--head-dim", "64", "--features", "plain", "--kernel", "forward")
    status, out, _ = bench("tune", *arguments, "--json")
    report = json.loads(out)
    assert (status, report["source"], report["stored"]) == (0, "model", False)
    (work,) = report["works"]
    cycles = [each["cycles"] for each in work["candidates"] if each.get("spills") == 0]
    assert len(cycles) > 2
    assert cycles == sorted(cycles)
    assert "not a measurement" in " ".join(bench("tune", *arguments)[1].split())
    assert bench("tune", "--model", "--dry-run")[0] == 2
    assert "16 bits" in bench("tune", "--model", "--dtype", "float32", "--features", "plain")[2]
