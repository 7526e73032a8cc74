"""New processes to the first token: both libraries read one folder, and what fails keeps its row and reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cases import first_token
from fastattn.models import load
from measure.protocols import CannotRun
from peers.gpt import product_weights, save_gpt2
from peers.llama import save_llama
from report import figures

SPEAKS = "import sys\nprint('loading', 'first token 7 after 0.250 s without imports', flush=True)"
BREAKS = "import sys\nsys.exit('no such module') if sys.argv[1] == {name!r} else None\n" + SPEAKS


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    first_token.measure.cache_clear()
    yield
    first_token.measure.cache_clear()


def test_both_figures_come_from_the_same_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "PROGRAM", SPEAKS)
    started: list[str] = []
    run_once = first_token.run_once
    monkeypatch.setattr(first_token, "run_once", lambda *args: started.append(args[0]) or run_once(*args))
    monkeypatch.setattr(first_token, "PRESET", "")
    monkeypatch.setattr(first_token, "ROUNDS", 2)
    whole, loaded = first_token.first_token_case(False), first_token.first_token_loaded_case(False)
    assert sorted(started) == sorted(
        3 * ["fastattn", "transformers", "floor-weight-products"]
    )  # the first round is not counted
    for entry in (whole, loaded):
        assert [row["time_ms"]["samples"] for row in entry["rows"]] == [2, 2, 2]
        assert entry["target"]["against"] == "transformers"
    assert (whole["target"]["time"], loaded["target"]["time"]) == (0.6, 1.0)
    assert {row["time_ms"]["median"] for row in loaded["rows"]} == {250.0}
    assert figures.verdict(loaded) == "met"
    assert whole["label"] != loaded["label"]


@pytest.mark.parametrize(("name", "status"), [("fastattn", "failed"), ("transformers", "unavailable")])
def test_a_process_without_a_token_gives_its_reason(
    name: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_token, "PROGRAM", BREAKS.format(name=name))
    rows = {row["provider"]: row for row in first_token.first_token_case(True)["rows"]}
    assert (rows[name]["status"], rows[name]["reason"]) == (status, "no such module")
    assert [row["status"] for row in rows.values() if row["provider"] != name] == ["ok", "ok"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_floor_multiplies_with_every_matrix_of_the_products(kind: str, tmp_path: Path) -> None:
    """And with no other: embeddings that are only looked up in are passed over."""
    {"llama": save_llama, "gpt2": save_gpt2}[kind](tmp_path, "")
    counted = first_token.PROGRAM.replace(
        "started =", "from torch.utils.flop_counter import FlopCounterMode\nstarted ="
    )
    counted = counted.replace("ids =", "flops = FlopCounterMode(display=False).__enter__()\nids =")
    counted = counted.replace("{token}", "{flops.get_total_flops()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_token, "PROGRAM", counted)
        run = first_token.run_once("floor-weight-products", tmp_path, kind)
    weights = sum(weight.numel() for weight in product_weights(load(tmp_path)))
    assert run.token == 2 * 4 * weights
    assert run.after_imports > 0


def test_our_process_makes_the_token_of_the_weights(tmp_path: Path) -> None:
    size = save_llama(tmp_path, "")
    assert size == (tmp_path / "model.safetensors").stat().st_size - _header(tmp_path)
    run = first_token.run_once("fastattn", tmp_path)
    ids = load(tmp_path).generate(torch.tensor([[3, 29, 31, 25]]), max_new_tokens=1)
    assert run.token == int(ids[0, -1])
    assert 0 < run.after_imports < run.whole


@pytest.mark.exhaustive
def test_their_process_makes_the_same_token(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_llama(tmp_path, "")
    ours, theirs = (first_token.run_once(name, tmp_path) for name in ("fastattn", "transformers"))
    assert ours.token == theirs.token


def test_a_folder_that_is_missing_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="nowhere"):
        first_token.run_once("fastattn", tmp_path / "nowhere")


def _header(folder: Path) -> int:
    """Bytes before the weights: a length and a table of contents."""
    raw = (folder / "model.safetensors").read_bytes()
    return 8 + int.from_bytes(raw[:8], "little")
