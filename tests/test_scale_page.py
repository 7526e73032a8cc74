"""docs/scale.md: its worked example is what its formulas give for the preset, whose parameters are counted."""

from pathlib import Path

import pytest
import torch

from fastattn.models import GPT, GPTConfig
from fastattn.models.config import PRESETS
from fastattn.train.recompute import blocks_of

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
PRESET, ROWS, LENGTH = "gpt2-xl", 4, 1024  # rows of a micro-batch on a GPU, tokens of a row


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS[PRESET]))
    blocks = blocks_of(model)
    return {
        "P": sum(p.numel() for p in model.parameters()),
        "U": sum(p.numel() for p in blocks[0].parameters()),
        "R": sum(p.numel() for p in model.parameters())
        - sum(p.numel() for b in blocks for p in b.parameters()),
        "L": len(blocks),
        "E": model.config.n_embd,
    }


def memory(s: dict[str, int], way: str, gpus: int) -> float:
    """Bytes on each GPU besides activations."""
    if way == "one":
        return 16 * s["P"]
    if way == "ddp":
        return 20 * s["P"]
    return 16 * s["P"] / gpus + 4 * (s["R"] + 2 * s["U"]) + 4 * max(s["R"], s["U"])


def traffic(s: dict[str, int], way: str, gpus: int) -> float:
    """Bytes that each GPU sends in a step of one micro-batch."""
    if way == "one":
        return 0.0
    share = (gpus - 1) / gpus
    return share * (2 * 4 * s["P"] if way == "ddp" else 4 * (s["P"] + (s["P"] - s["R"]) + s["P"]))


def activations(s: dict[str, int], recomputed: bool) -> float:
    tokens = ROWS * LENGTH
    block = 34 * tokens * s["E"]
    return 4 * tokens * s["E"] * s["L"] + block if recomputed else block * s["L"]


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def test_the_worked_example_is_what_the_formulas_give(sizes: dict[str, int]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    vocab_size = GPTConfig(**PRESETS[PRESET]).vocab_size  # the commands train a tokenizer of this size
    assert text.count(f"--model {PRESET}") == text.count(f"--data.vocab_size={vocab_size} ") == 3
    for letter, value in sizes.items():
        assert f"{letter} = {value:,}" in text, (letter, value)
    for name, way, gpus in (
        ("1", "one", 1),
        ("8, DDP", "ddp", 8),
        ("8, FSDP2", "fsdp", 8),
        ("256, FSDP2", "fsdp", 256),
    ):
        row = f"| {name} | {gb(memory(sizes, way, gpus))} | {gb(traffic(sizes, way, gpus))} |"
        assert row in text, row
    for recomputed, words in ((False, "kept"), (True, "computed again")):
        assert f"{words}: {gb(activations(sizes, recomputed))}" in text, (
            words,
            gb(activations(sizes, recomputed)),
        )
    heads, dim, length = 8, 128, 131_072
    assert (
        f"{2 * heads * length * dim * 2 / 2**20:.0f} MiB" in text
    )  # keys and values of a layer, context parallel
