"""`fastattn bench model` and `bench tune --model`: what they choose, print and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn.cli import app
from fastattn.console import NoOutput
from fastattn.kernels import tuned
from fastattn.kernels.tuned import tiles_for
from fastattn.tune import ahead, extension, model
from fastattn.tune.command import Options, forget_lookups, tune
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
        (("--rows", "64"), "--function, --rows: are only used with --cubin"),
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
    monkeypatch.setattr(tuned, "store", lambda *_: pytest.fail("a model's tiles were stored unasked"))
    status, out, _ = bench("tune", *ONE, "--json")
    report = json.loads(out)
    assert (status, report["source"], report["stored"]) == (0, "model", False)
    (work,) = report["works"]
    cycles = [each["cycles"] for each in work["candidates"] if each.get("spills") == 0]
    assert len(cycles) > 2
    assert cycles == sorted(cycles)
    assert "not a measurement" in " ".join(bench("tune", *ONE)[1].split())
    assert bench("tune", "--model", "--dry-run")[0] == 2
    assert "16 bits" in bench("tune", "--model", "--dtype", "float32", "--features", "plain")[2]


ONE = ("--model", "--quick", "--head-dim", "64", "--features", "plain", "--kernel", "forward")
WORK64 = Work("forward", "bfloat16", 64, 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, nothing looked up yet."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    forget_lookups()
    yield tmp_path
    forget_lookups()


@pytest.mark.usefixtures("compiler")
def test_storing_writes_the_models_choice_for_the_named_device(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = bench("tune", *ONE, "--store", "--device", "A Hopper", "--json")
    assert status == 0, err
    report = json.loads(out)
    target = tuned.Machine.of("A Hopper", 90)
    assert (report["stored"], report["path"]) == (True, str(target.path))
    assert target.path.is_relative_to(cache)
    ((name, winner),) = tuned.load(target).items()
    assert (name, winner.source) == (WORK64.signature(90), tuned.MODEL)
    best = next(each for each in report["works"][0]["candidates"] if each.get("spills") == 0)
    assert winner.tile == model.Tile(**best["tile"]) != WORK64.built_in(90)
    assert winner.ms == pytest.approx(best["cycles"] / 1.83e6)
    monkeypatch.setattr(tuned, "device_name", lambda arch: "A Hopper")
    forget_lookups()
    assert tiles_for(WORK64.spec(90)).forward == winner.tile
    assert bench("tune", *ONE, "--store")[0] == 0  # the device here


@pytest.mark.usefixtures("compiler", "cache")
@pytest.mark.parametrize("tile", [WORK64.built_in(90), model.Tile(64, 64, 4, 2)], ids=["built-in", "another"])
def test_what_was_measured_stays(tile: model.Tile) -> None:
    """The built-in tile too, where measuring found nothing faster."""
    target = tuned.Machine.of("A Hopper", 90)
    measured = {WORK64.signature(90): tuned.Winner(tile, 1.0, 1.0)}
    tuned.store(target, measured)
    status, out, _ = bench("tune", *ONE, "--store", "--device", "A Hopper")
    assert (status, tuned.load(target)) == (0, measured)
    assert "measured ones stay: 1" in " ".join(out.split())


@pytest.mark.usefixtures("compiler", "cache")
def test_measuring_replaces_what_the_model_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tuned.Machine.of("A Hopper", 90)
    assert bench("tune", *ONE, "--store", "--device", "A Hopper")[0] == 0
    assert tuned.load(target)[WORK64.signature(90)].source == tuned.MODEL

    class BuiltInIsFastest:
        def verdict(self, work: Work, tile: model.Tile) -> str | None:
            return None

        def seconds(self, work: Work, tile: model.Tile) -> float:
            return 1.0 if tile == work.built_in(90) else 2.0

    tune([WORK64], Options(quick=True), target, 90, BuiltInIsFastest(), NoOutput())
    (winner,) = tuned.load(target).values()
    assert (winner.tile, winner.source) == (WORK64.built_in(90), tuned.MEASURED)


def ranked(tile: model.Tile, cycles: float, spills: int = 0) -> model.Ranked:
    return model.Ranked(tile, replace(MADE, cycles=cycles, spills=spills))


def test_a_gain_within_the_models_noise_leaves_the_built_in_tile() -> None:
    built_in, other = model.Tile(128, 64, 8, 2), model.Tile(128, 32, 8, 2)
    for cycles, tile in ((1030, other), (1029, built_in)):
        chosen = model.choice([ranked(other, 1000), ranked(built_in, cycles)], built_in)
        assert chosen is not None
        assert chosen.tile == tile
    slower = model.choice([ranked(other, 1200), ranked(built_in, 1000, spills=8)], built_in)
    assert slower is not None
    assert slower.tile == built_in
    assert model.choice([model.Ranked(other, None, "failed")], built_in) is None


def test_a_loop_that_reads_more_than_the_l2_cache_gives_is_bound_by_it() -> None:
    """64 rows of head dim 128 in 16 bits stay: 128 x 2 x 128 x 2 bytes for 64 x 128 scores, 28 a clock."""
    assert model.l2_cycles(WORK, model.Tile(64, 128, 4, 2)) == pytest.approx(65536 / 28)
    assert model.l2_cycles(WORK, model.Tile(128, 64, 8, 2)) == pytest.approx(32768 / 28)
    assert model.l2_cycles(replace(WORK, kernel="dkdv"), model.Tile(32, 64, 4, 2)) == pytest.approx(
        65536 / 28
    )
    bound = model.Ranked(model.Tile(64, 128, 4, 2), replace(MADE, cycles=2000.0), None, 2340.0)
    assert (bound.cycles, bound.bound, bound.entry()["cycles"]) == (2340.0, "L2", 2340.0)


@pytest.mark.usefixtures("compiler", "cache")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--store",), "--store: is only used with --model"),
        (("--model", "--device", "A Hopper"), "--device: is only used with --store"),
        (("--model", "--store", "--device", ""), "--device: got ''"),
        (("--model", "--store", "--device", "x" * 101), "--device: got"),
        (("--model", "--store", "--device", "a\nb"), "--device: got"),
        (("--model", "--store"), "--device names the one"),
    ],
)
def test_storing_for_no_device_is_refused(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "device_name", lambda arch: None)
    status, _, err = bench("tune", *arguments)
    assert status == 2
    assert words in " ".join(err.split())
