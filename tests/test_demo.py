"""The demo: its files and summary, its verdict when something is wrong, and the honesty of its grid."""

import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import demo, demo_grid, plot
from fastattn.cli.console import PlainOutput
from fastattn.console import InputError, NoOutput
from fastattn.models import GPT

CPU = torch.device("cpu")
SMALL = demo.Recipe(
    grid=(demo_grid.Case("causal", 64, options={"causal": True}),),
    vocab_size=300,
    block_size=32,
    n_embd=32,
    n_layer=1,
    n_head=2,
    steps=12,
    lr=1e-2,
    warmup_steps=2,
    sample_tokens=8,
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and the dog sat on the log.\n" * 80, encoding="utf-8")
    return path


def run_small(
    text: Path, out: Path | None, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    monkeypatch.setattr(demo, "QUICK", SMALL)
    settings: dict[str, Any] = {"seed": 0, "steps": None, "quick": True, "output": NoOutput()} | options
    return demo.run(text, out, **settings)


def test_it_writes_what_it_says(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = text.parent / "out"
    summary = run_small(text, out, monkeypatch, output=PlainOutput(sys.stdout))
    printed = capsys.readouterr().out
    assert summary["passed"] is True
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    training = summary["training"]
    assert (out / "sample.txt").read_text().strip() == training["sample"].strip() != ""
    assert training["perplexity_after"] < training["perplexity_before"]
    assert training["perplexity_before"] == pytest.approx(300, rel=0.3)  # an untrained model guesses evenly
    assert sum(p.numel() for p in GPT.from_pretrained(out / "model").parameters()) == training["parameters"]
    assert len(list((out / "model").glob("checkpoint-*"))) == 1
    for shown in (
        "triton",
        "causal",
        "swapped 4 modules",
        f"{training['perplexity_after']:.1f}",
        "every check passed",
        "at parity or slower",
    ):
        assert shown in printed


def test_without_matplotlib_it_prints_the_curve(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "is_available", lambda: False)
    out = text.parent / "out"
    run_small(text, out, monkeypatch, output=PlainOutput(sys.stdout))
    printed = capsys.readouterr().out
    assert not (out / "loss.png").exists()
    assert "loss.png" not in printed
    assert "(. training, o validation)" in printed
    assert "pip install 'fastattn[plot]'" in printed


def test_a_seed_decides_the_training(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = enumerate((1, 1, 2))
    results = [run_small(text, text.parent / f"out{i}", monkeypatch, seed=seed, steps=3) for i, seed in runs]
    first, again, other = (result["training"]["perplexity_after"] for result in results)
    assert first == again != other
    assert all(result["training"]["steps"] == 3 for result in results)


def test_a_wrong_attention_is_caught(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **options: right(*args, **options) * 1.001)
    summary = run_small(text, text.parent / "out", monkeypatch)
    assert summary["passed"] is False
    assert [row["passed"] for row in summary["attention"]] == [False]


def test_a_failure_on_the_way_leaves_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(demo, "plot_loss", broken)
    made, existing = text.parent / "made", text.parent / "existing"
    existing.mkdir()
    for out in (made, existing):
        with pytest.raises(RuntimeError, match="broken"):
            run_small(text, out, monkeypatch)
    assert not made.exists()
    assert list(existing.iterdir()) == []


def test_without_a_directory_each_run_gets_its_own(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    outs = [run_small(text, None, monkeypatch, steps=1)["out"] for _ in range(2)]
    assert outs == ["fastattn-demo", "fastattn-demo-2"]


@pytest.mark.parametrize("case", [*demo_grid.QUICK, *demo_grid.FULL], ids=lambda case: case.name)
def test_every_provider_computes_the_same(case: demo_grid.Case) -> None:
    small = dataclasses.replace(case, length=96)
    inputs = demo_grid.make_inputs(small, CPU, torch.float64, seed=3)
    true = demo_grid.make_step(small, "formula", inputs)()
    for side in demo_grid.SIDES:
        results = demo_grid.make_step(small, side, inputs)()
        assert results.keys() == true.keys()
        for name, tensor in results.items():
            difference = (tensor - true[name]).abs().max().item()
            assert difference <= 1e-6 * (1 + true[name].abs().max().item()), (side, name)


def test_the_quick_grid_shows_what_a_user_would_use_it_for() -> None:
    """Masks that leave out much, at sizes where that counts, and a dense call to compare with."""
    assert all(case.length * case.batch >= 512 for case in demo_grid.QUICK)
    names = {case.name.split(" ")[1] if "," in case.name else case.name for case in demo_grid.QUICK}
    assert {"causal", "window", "4", "padded batch"} <= names
    for case in demo_grid.QUICK:
        if "window" in case.options or "segment_ids" in case.features:
            assert case.length >= 2048


def test_a_disk_without_room_is_a_line(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = types.SimpleNamespace(free=0)
    monkeypatch.setattr("fastattn.train.checkpoint.shutil.disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"--out: output_dir: .* GB free"):
        run_small(text, text.parent / "out", monkeypatch)
    assert not (text.parent / "out").exists()


def test_each_case_asks_for_its_features() -> None:
    for case in demo_grid.FULL:
        inputs = demo_grid.make_inputs(case, CPU, torch.float32, 0)
        assert set(case.features) <= set(inputs)
        spec = fastattn.explain(**{k: v for k, v in inputs.items() if k != "dout"}, **case.options).spec
        assert ("causal" in case.name) == (spec.causal != "none") or "softcap" in case.name


@pytest.mark.skipif(sys.platform == "win32", reason="memory is measured in forked processes")
def test_peak_memory_counts_what_a_pass_allocates() -> None:
    """The formula keeps at least scores and weights, 2 * H * S * S floats; attention in blocks far less."""
    case = demo_grid.Case("causal", 1024, options={"causal": True})
    scores = case.heads * case.length**2 * 4
    formula = demo_grid.peak_memory(case, "formula", CPU, torch.float32, 0)
    ours = demo_grid.peak_memory(case, "ours", CPU, torch.float32, 0)
    assert formula is not None
    assert ours is not None
    assert 2 * scores < formula < 12 * scores
    assert 0 < ours < 2 * scores


def test_times_are_medians_of_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    steps = [lambda name=name: order.append(name) or {} for name in "ab"]
    times = demo_grid._interleaved_ms(steps, CPU)
    assert order == ["a", "b"] * (1 + demo_grid.MAX_REPEATS)
    assert all(math.isfinite(ms) and ms >= 0 for ms in times)
