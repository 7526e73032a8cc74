"""The Triton attention kernels against float64, forward and every gradient, on shapes that cross the edges of tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, UNEVEN_TILES, Case, Inputs, check, run_reference, run_triton

from fastattn.backends import triton as backend
from fastattn.kernels.tiles import Tile, Tiles
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded
from fastattn.strides import empty_in_order
from numerics import assert_within_rule

BFLOAT = torch.bfloat16

WIDE = {
    "seqlen_q": 37,
    "seqlen_k": 53,
}  # several tiles on each side: some seen whole, some in part, some not at all
FLOAT32 = {"dtype": torch.float32, "samples": 4}

CASES = [
    Case("dense", batch=2, heads=2, kv_heads=2),
    Case("dense, whole tiles only", seqlen_q=32, seqlen_k=48),
    Case("dense, bfloat16", dtype=BFLOAT),
    Case("dense, float32", **FLOAT32),
    Case("one query", seqlen_q=1),
    Case("one key", seqlen_k=1),
    Case("causal", {"causal": True}, seqlen_q=53, seqlen_k=53),
    Case("causal, float32", {"causal": True}, **FLOAT32),
    Case("causal, more keys", {"causal": True}, **WIDE),
    Case("causal, more queries: rows without keys", {"causal": True}, seqlen_q=53, seqlen_k=20),
    Case("causal, top left", {"causal": "top_left"}, seqlen_q=20, seqlen_k=53),
    Case("causal, top left, more queries", {"causal": "top_left"}, seqlen_q=53, seqlen_k=20),
    Case("causal, bfloat16", {"causal": True}, dtype=BFLOAT),
    Case("causal, uneven tiles", {"causal": True}, seqlen_q=70, seqlen_k=83, tiles=UNEVEN_TILES),
    Case("window left", {"window": (5, None)}, **WIDE),
    Case("window right", {"window": (None, 7)}, **WIDE),
    Case("window both", {"window": (9, 4)}, seqlen_q=60, seqlen_k=60),
    Case("window, float32", {"window": (9, 4)}, **FLOAT32),
    Case("window of one key", {"window": (0, 0)}),
    Case("window wider than everything", {"window": (10**9, 10**9)}),
    Case("window, causal", {"window": (17, 3), "causal": True}, seqlen_q=53, seqlen_k=53),
    Case("window, causal, top left", {"window": (17, 3), "causal": "top_left"}, **WIDE),
    Case("window with whole tiles inside", {"window": (40, 40)}, seqlen_q=40, seqlen_k=90),
    Case("window, uneven tiles", {"window": (33, 20)}, seqlen_q=70, seqlen_k=83, tiles=UNEVEN_TILES),
    Case("window beyond all keys", {"window": (2, -1)}, seqlen_q=60, seqlen_k=20),
    Case("lengths", lambda make: {"key_lengths": torch.tensor([0, 1, 16, 37], device=DEVICE)}, batch=4),
    Case("lengths, float32", lambda make: {"key_lengths": torch.tensor([29], device=DEVICE)}, **FLOAT32),
    Case(
        "lengths, causal",
        lambda make: {"key_lengths": torch.tensor([29, 37], device=DEVICE), "causal": True},
        batch=2,
        seqlen_q=37,
    ),
    Case(
        "lengths, window",
        lambda make: {"key_lengths": torch.tensor([29, 40], device=DEVICE), "window": (20, 9)},
        batch=2,
        **WIDE,
    ),
    Case("grouped heads", {"causal": True}, heads=4, kv_heads=2),
    Case("one key head", {"window": (20, None)}, heads=3),
    Case("grouped heads, float32", {"causal": True}, heads=2, **FLOAT32),
    Case("head dim 1", head_dim=1, value_dim=1),
    Case("odd head dims", {"causal": True}, head_dim=59, value_dim=37),
    Case("value dim larger", head_dim=24, value_dim=80),
    Case("value dim smaller", head_dim=80, value_dim=8),
    Case("head dim 128", {"causal": True}, head_dim=128, value_dim=128, dtype=BFLOAT),
    Case("head dim 256", {"causal": True}, head_dim=256, value_dim=256),
    Case("scale", {"scale": 1.7}),
    Case("negative scale", {"scale": -0.4, "causal": True}),
    Case("zero scale", {"scale": 0.0}),
    Case("large scores", {"scale": 60.0}, dtype=BFLOAT),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
def test_empty(empty: str) -> None:
    case = replace(Case("empty"), **{empty: 0})
    results = check(case)
    if empty == "seqlen_k":
        assert (results["out"] == 0).all()
        assert (results["lse"] == float("-inf")).all()


def test_rows_without_keys_give_zero() -> None:
    case = Case("more queries", {"causal": True}, seqlen_q=53, seqlen_k=20)
    inputs = Inputs.of(case)
    inputs.dlse[:, :, :33] = float("nan")  # ignored there
    results = run_triton(inputs, SMALL_TILES)
    assert (results["out"][:, :, :33] == 0).all()
    assert (results["lse"][:, :, :33] == float("-inf")).all()
    assert (results["dquery"][:, :, :33] == 0).all()
    assert all(results[name].isfinite().all() for name in ("out", "dquery", "dkey", "dvalue"))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_leaks_from_beyond_the_lengths(poison: float) -> None:
    lengths = torch.tensor([0, 7, 16, 30], device=DEVICE)
    case = Case("poison", lambda make: {"key_lengths": lengths}, batch=4, seqlen_q=20)
    clean = Inputs.of(case)
    dirty = Inputs.of(case)
    for row, length in enumerate(lengths.tolist()):
        dirty.key[row, :, length:] = poison
        dirty.value[row, :, length:] = poison
    expected, actual = run_triton(clean, SMALL_TILES), run_triton(dirty, SMALL_TILES)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    for row, length in enumerate(lengths.tolist()):
        assert (actual["dkey"][row, :, length:] == 0).all()
        assert (actual["dvalue"][row, :, length:] == 0).all()


LAYOUTS = {
    "sequence before heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch innermost but one": lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "rows apart": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "columns apart": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    case = Case("strides", {"causal": True}, batch=2, heads=2, seqlen_q=20, seqlen_k=20)
    inputs = Inputs.of(case)
    expected = run_triton(inputs, SMALL_TILES)
    for name in ("query", "key", "value", "dout"):
        setattr(inputs, name, LAYOUTS[layout](getattr(inputs, name)))
    actual = run_triton(inputs, SMALL_TILES)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_output_has_the_memory_order_of_the_query() -> None:
    case = Case("order", heads=2, seqlen_q=20, seqlen_k=20)
    inputs = Inputs.of(case)
    inputs.query = LAYOUTS["sequence before heads"](inputs.query)
    results = run_triton(inputs, SMALL_TILES)
    assert results["out"].stride() == empty_in_order(inputs.query, inputs.query.shape).stride()
    assert results["out"].transpose(1, 2).is_contiguous()


def test_expanded_output_gradient() -> None:
    inputs = Inputs.of(Case("expanded", seqlen_q=20, seqlen_k=20))
    inputs.dout = torch.ones((), dtype=torch.float16, device=DEVICE).expand(inputs.dout.shape)
    inputs.dlse = torch.ones((), device=DEVICE).expand(inputs.dlse.shape)
    actual, golden = run_triton(inputs, SMALL_TILES), run_reference(inputs, torch.float64)
    plain = run_reference(inputs, torch.float16)
    for name, tensor in actual.items():
        assert_within_rule(tensor, plain[name], golden[name], name)


def test_only_the_gradients_asked_for() -> None:
    inputs = Inputs.of(Case("needs", seqlen_q=20, seqlen_k=20))
    call = inputs.call()
    expected = run_triton(inputs, SMALL_TILES)
    out, lse = backend.attention_fwd(AttentionSpec.of(call), call, SMALL_TILES)
    for name in ("query", "key", "value"):
        needs = GradsNeeded(**{other: other == name for other in ("query", "key", "value")})
        grads = backend.attention_bwd(
            AttentionSpec.of(call, needs), call, out, lse, inputs.dout, inputs.dlse, needs, SMALL_TILES
        )
        for other in ("query", "key", "value"):
            grad = getattr(grads, other)
            assert (grad is None) == (other != name)
        assert torch.equal(getattr(grads, name), expected["d" + name])


def test_repeats_bitwise() -> None:
    inputs = Inputs.of(Case("repeat", {"causal": True}, heads=2))
    first, second = run_triton(inputs, SMALL_TILES), run_triton(inputs, SMALL_TILES)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_sequence_alone_gives_the_same_bits_as_in_a_batch() -> None:
    case = Case("batch", {"window": (20, 5)}, batch=3, heads=2, seqlen_q=20)
    together = Inputs.of(case)
    expected = run_triton(together, SMALL_TILES)
    for row in range(case.batch):
        tensors = {
            name: getattr(together, name)[row : row + 1] for name in ("query", "key", "value", "dout", "dlse")
        }
        alone = run_triton(Inputs(options=together.options, **tensors), SMALL_TILES)
        for name, tensor in alone.items():
            assert torch.equal(tensor[0], expected[name][row]), name


def test_tiles_change_only_rounding() -> None:
    wide = Tiles(
        forward=Tile(64, 32, 4, 1), dkdv=Tile(32, 64, 4, 1), dq=Tile(64, 32, 4, 1), dbias=Tile(32, 32, 4, 1)
    )
    case = Case("tiles", {"causal": True, "window": (30, None)}, seqlen_q=100, seqlen_k=100, tiles=wide)
    check(case)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu", "arch": None}, "cpu"),
        ({"arch": 75}, "7.5"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 257}, "257"),
        ({"value_dim": 300}, "300"),
    ],
)
def test_refusals(change: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.empty(1, 1, 16, 16)
    spec = AttentionSpec.of(AttentionCall(query, query, query)).replace(device="cuda", arch=90)
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    assert backend.why_not(spec) is None
    assert backend.why_not_auto(spec) is None
    assert reason in backend.why_not(spec.replace(**change))


def test_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.empty(1, 1, 16, 16)
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "not installed" in backend.why_not(AttentionSpec.of(AttentionCall(query, query, query)))
