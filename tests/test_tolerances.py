"""Numeric tolerances in tests: results are held to the error rule (numerics.py), and what is not is listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
KEYWORDS = {"rtol", "atol", "rel", "abs"}
CLOSE = {"allclose", "isclose", "assert_close", "assert_allclose", "approx"}
OF_FLOAT64 = (
    1e-8  # what is closer is a comparison of float64 with itself: float32 cannot pass it by being wrong
)
LARGEST = 0.25  # greater numbers in a comparison are quantities, not tolerances

MODEL = "float32 models: the route changes no mask; assert_model_within_rule holds their results to the rule"
ALLOWED: dict[str, tuple[int, str]] = {  # by file: how many, and why
    "benchmarks/test_bench_train.py": (
        1,
        "losses of whole models, to see that all providers train the same one",
    ),
    "benchmarks/test_benches.py": (1, "another's kernels, which need not keep our rule"),
    "benchmarks/test_harness.py": (2, "times and ratios of times, rounded in reports"),
    "cuda_emulation/test_softmax.py": (1, "one unit in the last place of 16 bits, of two kernels' results"),
    "generation/test_speculation.py": (1, "how near the fitted cost of a step comes to the timed ones"),
    "integrations/test_diffusers.py": (1, MODEL),
    "integrations/test_flash_attn_cache.py": (1, "a cache's rows in 16 bits, rotated in two orders"),
    "integrations/test_swap.py": (2, "a loss after eight float32 steps of training"),
    "integrations/test_transformers_restore.py": (1, "losses of nine float32 steps of training"),
    "integrations/test_transformers_flash.py": (1, MODEL),
    "integrations/test_transformers_swap.py": (3, MODEL),
    "kernels/test_decode_memory.py": (1, "one unit in the last place of fp16, of values rounded once"),
    "kernels/test_single_query.py": (1, "two float32 modules, to see that the kernel for one query is used"),
    "kernels/test_triton_interpreter.py": (1, "shows that the uncorrected interpreter is wrong"),
    "models/test_checkpoint.py": (
        4,
        "transformers' float32 GPT-2 beside ours: that weights land where they belong",
    ),
    "models/test_decoder.py": (3, "float32 losses of theirs and ours"),
    "models/test_decoder_training.py": (3, "how far a loss or a bfloat16 model may be from exact"),
    "models/test_dropout_gradients.py": (1, "central differences of float64"),
    "models/test_encoder_real_weights.py": (1, "cosines of real sentences, as a user would hold them"),
    "ops/test_nonfinite.py": (3, "a saturated float64 bias beside a reference of its own"),
    "ops/test_spelling.py": (1, "seconds of a call"),
    "test_demo.py": (2, "an untrained model's perplexity; float32 weights trained on two sides"),
    "tasks/test_taught.py": (1, "a loss in float32 beside its formula in float64"),
    "train/test_distributed.py": (3, "logged losses, rounded to float32, and a command's run in float32"),
    "train/test_gpt.py": (4, "logged losses in float32; a model swapped for another's"),
    "train/test_held_out_text.py": (6, "shares of a text that are held out"),
    "train/test_time_limits.py": (4, "learning rates, rounded in logs"),
    "train/test_trainer.py": (7, "learning rates, rounded in logs, and float32 losses and norms"),
    "transformers_rule.py": (1, "gradients that are zero, beside the largest"),
    "tune/test_cycles.py": (1, "cycles of a model beside hand counts"),
}


def literals(node: ast.AST) -> Iterator[float]:
    """The float constants in an expression that are coarser than float64's rounding, but those of `share_bound`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "share_bound":
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value > OF_FLOAT64:
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from literals(child)


def tolerances(source: str) -> list[int]:
    """The lines of a module that have a tolerance typed by hand."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name in CLOSE:
            given = [k.value for k in node.keywords if k.arg in KEYWORDS]
            given += node.args[1 if name == "approx" else 2 :]
            if any(any(literals(value)) for value in given):
                found.append(node.lineno)
    for node in ast.walk(tree):
        compared = (
            [part for part in ast.walk(node) if isinstance(part, ast.Compare)]
            if isinstance(node, ast.Assert)
            else []
        )
        for part in compared:
            sides = (part.left, *part.comparators)
            less = any(isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for op in part.ops)
            if less and any(v < LARGEST for side in sides for v in literals(side)):
                found.append(part.lineno)
    return sorted(set(found))


def files() -> list[Path]:
    """Every test module."""
    return sorted(TESTS.rglob("*.py"))


def test_no_tolerance_is_typed_by_hand_but_those_listed() -> None:
    found = {}
    for path in files():
        lines = tolerances(path.read_text(encoding="utf-8"))
        if lines:
            found[path.relative_to(TESTS).as_posix()] = lines
    counts = {name: len(lines) for name, lines in found.items()}
    unlisted = {name: found[name] for name in counts if counts[name] > ALLOWED.get(name, (0, ""))[0]}
    assert not unlisted, "hold these to numerics.assert_within_rule, or list them with a reason"
    assert counts == {name: count for name, (count, _) in ALLOWED.items()}, "the list names what is gone"


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("torch.testing.assert_close(a, b, rtol=1e-2, atol=0)", 1),
        ("torch.testing.assert_close(a, b, rtol=2 * 1e-5, atol=x)", 1),
        ("assert torch.allclose(a, b, 1e-4)", 1),
        ("assert a == pytest.approx(b, rel=0.05)", 1),
        ("assert a == pytest.approx(b, 0.05)", 1),
        ("assert error < 1e-5", 1),
        ("assert (a - b).abs().max() <= 1e-6 * scale", 1),
        ("assert (a > 0.1).all()", 1),
        ("torch.testing.assert_close(a, b)", 0),
        ("keep = torch.rand(3) < 0.1", 0),
        ("assert share == pytest.approx(0.1, abs=share_bound(0.1, 1000))", 0),
        ("torch.testing.assert_close(a, b, rtol=0, atol=0)", 0),
        ("torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)", 0),
        ("assert a == pytest.approx(3.25)", 0),
        ("assert seconds < 0.5", 0),
    ],
)
def test_what_counts_as_a_tolerance(source: str, number: int) -> None:
    assert len(tolerances(source)) == number
