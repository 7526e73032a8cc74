"""Tuning: candidates that could fit, the wrong and the failing refused by name, the race, winners calls pick up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastattn import cli
from fastattn.backends import triton as triton_backend
from fastattn.console import InputError, NoOutput
from fastattn.kernels import tuned
from fastattn.kernels.tiles import FAMILIES, Tile, family_of, table_tiles
from fastattn.kernels.tuned import Machine, Winner, tiles_for
from fastattn.tune import plan
from fastattn.tune.command import Options, Verdicts, forget_lookups, list_candidates, tune, tune_one
from fastattn.tune.plan import Work, candidates, race, winner_of

CARD = "An Accelerator 9000"
WORK = Work("forward", "bfloat16", 128, 128, ("causal",))
FAST = Tile(
    64, 128, 8, 2, tma=True
)  # these three are a step from the row of WORK, as quick tuning tries them
FAILING, WRONG = Tile(128, 128, 8, 3, tma=True), Tile(128, 64, 8, 2, tma=True)


class FakeDevice:
    """A device on which FAST is the fastest tile, FAILING doesn't launch and WRONG gives another answer."""

    def __init__(self) -> None:
        self.timed: list[Tile] = []

    def verdict(self, work: Work, tile: Tile) -> str | None:
        if tile == FAILING:
            return "OutOfResources: shared memory"
        return "wrong: out is off by 1, allowed 0.01" if tile == WRONG else None

    def seconds(self, work: Work, tile: Tile) -> float:
        self.timed.append(tile)
        return {FAST: 0.8e-3, work.built_in(90): 1.0e-3}.get(tile, 1.1e-3)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """One Hopper card, an empty cache, nothing looked up yet."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "device_name", lambda arch: CARD)
    monkeypatch.setattr(tuned, "version", lambda package: f"1.0 of {package}")  # Triton may be missing
    forget_lookups()
    yield Machine.of(CARD, 90)
    forget_lookups()


def tuned_once(machine: Machine, work: Work = WORK) -> dict[str, Any]:
    return tune([work], Options(quick=True), machine, 90, FakeDevice(), NoOutput())


def test_the_fastest_right_tile_is_stored_and_used(machine: Machine) -> None:
    spec = WORK.spec(90)
    assert tiles_for(spec).forward == WORK.built_in(90) != FAST
    report = tuned_once(machine)
    (entry,) = report["works"]
    assert entry["winner"] == asdict(FAST)
    assert (entry["built_in_ms"], entry["winner_ms"]) == (1.0, 0.8)
    assert tiles_for(spec) == replace(table_tiles(spec), forward=FAST)
    stored = json.loads(Path(report["path"]).read_text())
    assert stored["machine"]["device"] == CARD
    assert list(stored["winners"]) == ["forward bfloat16 D128 Dv128 right"]


def test_a_wrong_and_a_failing_candidate_are_listed_with_the_reason_and_never_timed(machine: Machine) -> None:
    device = FakeDevice()
    entry = tune_one(WORK, Options(quick=True), 90, device)
    by_tile = {Tile(**candidate["tile"]): candidate for candidate in entry["candidates"]}
    assert by_tile[WRONG]["reason"].startswith("wrong: out is off by 1")
    assert by_tile[FAILING]["reason"].startswith("OutOfResources")
    assert by_tile[FAST]["reason"] is None
    assert {WRONG, FAILING}.isdisjoint(device.timed)
    assert by_tile[WRONG]["ms"] is None


def test_a_candidate_that_fails_while_it_is_timed_loses(machine: Machine) -> None:
    class Fragile(FakeDevice):
        def seconds(self, work: Work, tile: Tile) -> float:
            if tile == FAST:
                raise RuntimeError("out of memory")
            return super().seconds(work, tile)

    entry = tune_one(WORK, Options(quick=True), 90, Fragile())
    assert entry["winner"] == entry["built_in"]
    assert "RuntimeError: out of memory" in [candidate["reason"] for candidate in entry["candidates"]]


def test_where_nothing_is_right_there_is_no_winner(machine: Machine) -> None:
    class Broken(FakeDevice):
        def verdict(self, work: Work, tile: Tile) -> str | None:
            return "wrong: lse is off by 2, allowed 0.1"

    report = tune([WORK], Options(quick=True), machine, 90, Broken(), NoOutput())
    assert report["failed"] == [str(WORK)]
    assert tiles_for(WORK.spec(90)) == table_tiles(WORK.spec(90))


def test_a_winner_serves_nothing_but_what_it_was_measured_for(machine: Machine) -> None:
    tuned_once(machine)
    spec = WORK.spec(90)
    assert tiles_for(spec.replace(causal="top_left")).forward == FAST  # the same kernel
    for other in (
        {"dtype": torch.float16},
        {"head_dim": 127},
        {"softcap": True},
        {"causal": "none"},
        {"window_left": True},
        {"sinks": True},
        {"aligned": False},
        {"int64_offsets": True},
        {"arch": None},
    ):
        changed = spec.replace(**other)
        assert tiles_for(changed) == table_tiles(changed), other
    assert tiles_for(spec, packed=True) == table_tiles(spec)


@pytest.mark.skipif(find_spec("triton") is None, reason="without Triton nothing is said of its tiles")
def test_explaining_says_that_a_tile_was_measured(machine: Machine) -> None:
    tuned_once(machine)
    spec = WORK.spec(90)
    assert triton_backend.tiles(spec) == f"forward {FAST}, measured here"
    assert "measured" not in (triton_backend.varlen_tiles(spec) or "measured")
    assert (triton_backend.tiles(spec.replace(backward=True)) or "").endswith("measured here")
    assert "measured" not in (triton_backend.tiles(spec.replace(head_dim=64)) or "measured")
    tuned.store(machine, {WORK.signature(90): Winner(FAST, 1.0, 2.0, tuned.MODEL)})
    forget_lookups()
    assert triton_backend.tiles(spec) == f"forward {FAST}, by the cycle model"


def test_gradients_look_up_their_own_kernels(machine: Machine) -> None:
    best = Tile(64, 64, 8, 1)
    tuned.store(machine, {"dq bfloat16 D128 Dv128 right": Winner(best, 1.0, 2.0)})
    spec = WORK.spec(90)
    assert tiles_for(spec) == replace(table_tiles(spec), dq=best)
    assert tiles_for(spec.replace(alibi=True, alibi_grad=True)).dq != best


def test_a_second_run_keeps_the_winners_of_other_calls_and_replaces_a_beaten_one(machine: Machine) -> None:
    tuned_once(machine)
    tuned_once(machine, replace(WORK, dtype="float16"))
    assert len(tuned.load(machine)) == 2

    class BuiltInIsFastest(FakeDevice):
        def seconds(self, work: Work, tile: Tile) -> float:
            return 1.0 if tile == work.built_in(90) else 1.5

    tune([WORK], Options(quick=True), machine, 90, BuiltInIsFastest(), NoOutput())
    stored = tuned.load(machine)
    assert stored["forward bfloat16 D128 Dv128 right"].tile == WORK.built_in(90)
    assert stored["forward float16 D128 Dv128 right"].tile == FAST
    assert tiles_for(WORK.spec(90)) == table_tiles(WORK.spec(90))


def test_time_that_is_up_leaves_the_rest_out(machine: Machine) -> None:
    report = tune([WORK], Options(quick=True, minutes=0.0), machine, 90, FakeDevice(), NoOutput())
    assert report["works"] == []
    assert report["left_out"] == [str(WORK)]


def damaged(text: str, **machine: str) -> str:
    stored = json.loads(text)
    stored["machine"] |= machine
    return json.dumps(stored)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "not used"),
        (lambda text: "[]", "not a fastattn-tiles file"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "of version 1"),
        (lambda text: damaged(text, device="another"), "another device"),
        (lambda text: damaged(text, kernels="0"), "other versions or kernels"),
        (lambda text: text.replace('"block_m": 64', '"block_m": 48'), "impossible tile"),
        (lambda text: text.replace('"block_m": 64', '"block_p": 64'), "no winner"),
        (lambda text: text.replace('"num_stages": 2', '"num_stages": "2"'), "impossible tile"),
        (lambda text: text.replace('"tf32x3": false', '"tf32x3": true'), "tf32x3"),
        (lambda text: text.replace('"measured"', '"heard of"'), "needs measured or model"),
        (lambda text: text.replace('"source"', '"origin"'), "no winner"),
        (lambda text: text.replace('"winners"', '"losers"'), "has no winners"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_warning_and_the_built_in_tiles(
    machine: Machine, damage: Any, says: str
) -> None:
    tuned_once(machine)
    machine.path.write_text(damage(machine.path.read_text()))
    forget_lookups()
    spec = WORK.spec(90)
    with pytest.warns(RuntimeWarning, match="not used") as caught:
        found = tiles_for(spec), tiles_for(spec.replace(head_dim=64))
    assert found == (table_tiles(spec), table_tiles(spec.replace(head_dim=64)))
    assert len(caught) == 1
    assert says in str(caught[0].message)


def test_the_file_is_read_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_once(machine)
    assert tiles_for(WORK.spec(90)).forward == FAST
    machine.path.unlink()
    assert tiles_for(WORK.spec(90)).forward == FAST
    assert tiles_for(WORK.spec(90).replace(backward=True)).forward == FAST


def test_devices_of_several_names_have_no_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["One", "Other"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert tuned.device_name(90) is None
    assert tuned.device_name(80) is None
    names[1] = "One"
    assert tuned.device_name(90) == "One"


def test_versions_have_files_of_their_own(machine: Machine) -> None:
    others = (replace(machine, triton="0"), replace(machine, fastattn="0"), replace(machine, device="Other"))
    assert len({machine.path, *(other.path for other in others)}) == 4
    assert replace(machine, kernels="0").path == machine.path  # only the last kernels' winners are of use


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("kernel", tuned.KERNELS)
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_candidates_fit_and_the_built_in_tile_is_among_them(arch: int, kernel: str, dtype: str) -> None:
    limit = FAMILIES[family_of(arch)][1]
    for head_dim in plan.HEAD_DIMS:
        work = Work(kernel, dtype, head_dim, head_dim, ("bias",))
        found = candidates(work, arch)
        assert found[0].tile == work.built_in(arch)
        assert found[0].reason is None
        assert len({candidate.tile for candidate in found}) == len(found)
        possible = [candidate.tile for candidate in found if candidate.reason is None]
        assert all(plan.least_shared(work, tile) <= limit for tile in possible)
        assert len(possible) > 8
        assert any(tile.tf32x3 for tile in possible) == (dtype == "float32")
        quick = [candidate.tile for candidate in candidates(work, arch, quick=True)]
        assert quick[0] == found[0].tile
        assert set(quick) < {candidate.tile for candidate in found}


def test_what_cannot_fit_says_why() -> None:
    reasons = {c.tile: c.reason for c in candidates(Work("forward", "float32", 256, 256), 86)}
    assert "bytes of shared memory, the limit is 101376" in reasons[Tile(16, 64, 8, 2)]
    reasons = {c.tile: c.reason for c in candidates(Work("dkdv", "float32", 256, 256), 90)}
    assert "registers per thread" in reasons[Tile(16, 64, 4, 1)]


def test_tf32x3_is_no_candidate_where_products_need_not_be_exact() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        assert not any(c.tile.tf32x3 for c in candidates(Work("forward", "float32", 64, 64), 90))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_race_is_interleaved_and_drops_what_lags() -> None:
    order: list[str] = []
    speeds = {"a": 1.0, "b": 1.1, "slow": 2.0, "built-in": 3.0}

    def seconds(tile: Any) -> float:
        order.append(tile)
        return speeds[tile]

    medians = race(list(speeds), seconds, rounds=3, keep="built-in")  # type: ignore[arg-type, list-item]
    assert medians == speeds
    assert order[:4] == ["a", "b", "slow", "built-in"]
    assert order[4:7] == ["built-in", "b", "a"]
    assert order.count("slow") == 1
    assert order.count("built-in") == 3


def test_a_gain_within_the_noise_leaves_the_built_in_tile() -> None:
    built_in, other = Tile(64, 64, 4, 2), Tile(128, 64, 4, 2)
    assert winner_of({built_in: 1.0, other: 0.99}, built_in) == built_in
    assert winner_of({built_in: 1.0, other: 0.9}, built_in) == other
    assert winner_of({other: 0.9}, built_in) == other


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtypes": ("int8",)},
        {"kinds": ("causal+magic",)},
        {"kernels": ("sideways",)},
        {"kinds": ("packed+bias",)},
    ],
)
def test_names_that_do_not_exist_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="got"):
        Options(**arguments).works()


def test_dbias_is_tuned_only_where_there_is_a_bias() -> None:
    works = Options(dtypes=("bfloat16",), head_dims=((64, 64),), kinds=("plain", "bias")).works()
    assert [str(work) for work in works if work.kernel == "dbias"] == ["dbias bfloat16 D64 bias"]
    assert len(works) == 7


def command_line(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "tune", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_refuses_with_the_reason() -> None:
    done = command_line("--quick")
    assert done.exit_code == 2
    assert "needs" in done.output or "needs a CUDA GPU" in done.output


def test_a_dry_run_lists_candidates_anywhere() -> None:
    arguments = ("--dry-run", "--quick", "--arch", "86", "--dtype", "bfloat16", "--head-dim", "192,128")
    done = command_line(*arguments, "--json")
    assert done.exit_code == 0
    report = json.loads(done.output)
    assert report["arch"] == 86
    assert len(report["works"]) == 6
    assert report["works"][0]["name"] == "forward bfloat16 D192 Dv128 plain"
    assert "candidates" in command_line(*arguments).output
    same = list_candidates(Options(("bfloat16",), ((192, 128),), quick=True), 86, NoOutput())
    assert same == report


@pytest.mark.parametrize(
    "arguments", [("--head-dim", "0"), ("--head-dim", "64,64,64"), ("--dtype", "int8"), ("--arch", "90")]
)
def test_bad_options_are_one_line(arguments: tuple[str, ...]) -> None:
    done = command_line(*(arguments if arguments[0] == "--arch" else ("--dry-run", *arguments)))
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_a_crash_costs_one_candidate() -> None:
    """The verdicts are expressions here, which need nothing imported."""
    right, wrong, crash = ("None",), ("'wrong'",), ("__import__('os')._exit(1)",)
    with Verdicts(2, eval) as verdicts:
        assert verdicts.of([wrong, right, crash, right]) == ["wrong", None, "its process crashed", None]
        assert verdicts.of([right, crash]) == [None, "its process crashed"]


def test_the_lookup_of_tiles_costs_next_to_nothing_the_second_time() -> None:
    spec = WORK.spec(90)
    assert tiles_for(spec) is tiles_for(spec)
    assert tiles_for.cache_info().hits > 0


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tuning.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^fastattn bench tune ([^#\n]*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_commands_of_the_page_are_accepted(arguments: str) -> None:
    words = [
        word for word in arguments.split() if word != "--model"
    ]  # which compiles: tests/tune/test_model.py
    done = command_line(*words, *(() if "--dry-run" in words else ("--dry-run",)))
    assert done.exit_code == 0, done.output
    assert "candidates" in done.output


def test_the_page_has_its_examples() -> None:
    assert len(COMMANDS) == 5
    assert f"{round(100 * (plan.LEAST_GAIN - 1))} %" in PAGE
