"""dk and dv of few key/value heads: float32 sums over splits of the queries, added up in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, Case, Inputs, Maker, check, run_triton
from torch import Tensor
from varlen_cases import Case as PackedCase
from varlen_cases import check as check_packed

import fastattn
from fastattn.backends import triton as backend
from fastattn.kernels import launches, splits
from fastattn.kernels.splits import FEW_KV_HEADS, WHOLE, Split, split_count, split_of
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded

SMALL = Split(heads=2, queries=32)  # of the cases below, whose tiles are of 16 queries
SHAPE: dict[str, Any] = {"heads": 5, "kv_heads": 1, "seqlen_q": 70, "seqlen_k": 37}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Splits of a few heads and queries; the grids of the launches of dk and dv."""
    grids: list[tuple[int, ...]] = []
    make = launches.dkdv_launch

    def noting(*args: Any, **options: Any) -> launches.Launch:
        launch = make(*args, **options)
        grids.append(launch.grid)
        return launch

    monkeypatch.setattr(splits, "FEW_KV_HEADS", SMALL)
    monkeypatch.setattr(launches, "dkdv_launch", noting)
    return grids


def ids(make: Maker, length: int) -> Tensor:
    return torch.arange(length, device=DEVICE, dtype=torch.int32)[None] // 25


CASES = [
    Case("plain", **SHAPE),
    Case("causal", {"causal": True}, **SHAPE),
    Case("two key heads, window", {"window": (20, 5)}, batch=2, **SHAPE | {"heads": 6, "kv_heads": 2}),
    Case("splits without a visible query", {"window": (3, 3)}, **SHAPE | {"seqlen_q": 150}),
    Case("more queries than keys", {"causal": True}, **SHAPE | {"seqlen_q": 130, "seqlen_k": 20}),
    Case("bias, its gradient", lambda make: {"bias": make.normal(1, 5, 70, 37)}, **SHAPE),
    Case("mask", lambda make: {"mask": make.normal(1, 1, 70, 37) > 0}, **SHAPE),
    Case("segments", lambda make: {"segment_ids": (ids(make, 70), ids(make, 37))}, **SHAPE),
    Case("key lengths", lambda make: {"key_lengths": torch.tensor([0, 29], device=DEVICE)}, batch=2, **SHAPE),
    Case("softcap, alibi", lambda make: {"softcap": 2.0, "alibi_slopes": make.normal(5)}, **SHAPE),
    Case("sinks", lambda make: {"sinks": make.normal(5), "causal": True}, **SHAPE),
    Case("dropout", lambda make: {"dropout_p": 0.3, "dropout_seed": 5}, **SHAPE),
    Case("float32", {"causal": True}, dtype=torch.float32, samples=3, **SHAPE),
    Case(
        "bfloat16, odd head dims", {"causal": True}, head_dim=59, value_dim=37, dtype=torch.bfloat16, **SHAPE
    ),
    Case("head dim 1", head_dim=1, value_dim=1, **SHAPE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(small: list[tuple[int, ...]], case: Case) -> None:
    check(case)
    tiles = -(-case.seqlen_k // 16) * case.kv_heads * case.batch
    count = -(-(case.heads // case.kv_heads) // 2) * -(-case.seqlen_q // 32)
    assert count > 2
    assert small == [(tiles, count)] * case.samples


PACKED = [
    PackedCase("ragged", heads=5, kv_heads=1, lengths=((1, 1), (63, 65), (0, 9), (40, 3)), rest=(4, 6)),
    PackedCase("causal", {"causal": True}, heads=5, kv_heads=1, lengths=((20, 20), (37, 50))),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_are_split_by_heads(small: list[tuple[int, ...]], case: PackedCase) -> None:
    check_packed(case)
    assert {grid[1] for grid in small} == {3}


def test_the_workspace_changes_no_bit(small: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two splits' sums are always held; the first of them is the sum of all splits before."""
    inputs = Inputs.of(CASES[1])
    expected = run_triton(inputs, SMALL_TILES)
    for room, at_once in ((0, [2, 1, 1, 1, 1, 1, 1, 1]), (3, [3, 2, 2, 2])):
        small.clear()
        one = 37 * 2 * 16 * 4
        monkeypatch.setattr(splits, "WORKSPACE_BYTES", room * one)
        for name, tensor in run_triton(inputs, SMALL_TILES).items():
            assert torch.equal(tensor, expected[name]), name
        assert [grid[1] for grid in small] == at_once


@pytest.mark.usefixtures("small")
def test_a_sequence_alone_gives_the_same_bits_as_in_a_padded_batch() -> None:
    make, shape = Maker(), (2, 5, 150, 16)
    query, dout = (make.normal(*shape, dtype=torch.float16) for _ in range(2))
    key, value = (make.normal(2, 1, 90, 16, dtype=torch.float16) for _ in range(2))
    dlse = make.normal(*shape[:3])
    lengths = torch.tensor([37, 90], device=DEVICE)
    dout[0, :, 50:], dlse[0, :, 50:] = 0, 0  # the padding of the first
    tensors = {"query": query, "key": key, "value": value, "dout": dout, "dlse": dlse}
    together = run_triton(Inputs(options={"key_lengths": lengths}, **tensors), SMALL_TILES)
    first = {n: t[:1, :, : 37 if n in ("key", "value") else 50] for n, t in tensors.items()}
    alone = run_triton(Inputs(options={"key_lengths": lengths[:1]}, **first), SMALL_TILES)
    for name in ("dkey", "dvalue"):
        assert torch.equal(alone[name][0], together[name][0, :, :37]), name


def test_one_split_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(CASES[1])
    expected = run_triton(inputs, SMALL_TILES)
    monkeypatch.setattr(splits, "FEW_KV_HEADS", Split(heads=5, queries=80))
    monkeypatch.setattr(splits, "split_count", lambda *_: 2)  # the second has no queries
    for name, tensor in run_triton(inputs, SMALL_TILES).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.usefixtures("small")
def test_the_gradient_of_weights_is_split_too() -> None:
    make = Maker()
    query = make.normal(1, 5, 70, 16).requires_grad_()
    key, value = (make.normal(1, 1, 37, 16) for _ in range(2))
    key.requires_grad_()
    grads = {}
    for name in ("triton", "torch"):
        _, weights = fastattn.attention(query, key, value, causal=True, return_weights=True, backend=name)
        grads[name] = torch.autograd.grad(weights.square().sum(), (query, key))
    for one, other in zip(grads["triton"], grads["torch"]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kv_heads", "group", "seqlen_q", "packed", "count"),
    [
        (1, 32, 8192, False, 16),
        (1, 32, 512, False, 8),
        (2, 8, 4096, False, 2),
        (2, 4, 4096, False, 1),
        (1, 1, 16384, False, 4),
        (1, 32, 65536, True, 8),
        (3, 32, 65536, False, 1),
        (1, 1, 0, False, 1),
    ],
)
def test_which_calls_are_split(kv_heads: int, group: int, seqlen_q: int, packed: bool, count: int) -> None:
    query = torch.empty(1, 1, 1, 64).expand(3, kv_heads * group, seqlen_q, 64)
    key = torch.empty(1, 1, 1, 64).expand(3, kv_heads, 100, 64)
    spec = AttentionSpec.of(AttentionCall(query, key, key))
    split = split_of(spec, packed)
    assert (split == WHOLE) == (kv_heads > 2)
    assert split_count(split, group, seqlen_q) == count


def test_a_splits_queries_are_whole_tiles() -> None:
    """Of every tile there may be, 256 queries at most."""
    assert FEW_KV_HEADS.queries % 256 == 0


@pytest.mark.parametrize(("heads", "kv_heads", "said"), [(8, 1, True), (8, 4, False), (4, 1, False)])
def test_explain_says_it(heads: int, kv_heads: int, said: bool) -> None:
    query = torch.empty(1, heads, 64, 64, dtype=torch.float16, requires_grad=True)
    key = torch.empty(1, kv_heads, 64, 64, dtype=torch.float16)
    needs = GradsNeeded(query=True)
    spec = AttentionSpec.of(AttentionCall(query, key, key), needs)
    for packed, text in ((False, "sums of 4 heads and 4096 queries"), (True, "sums of 4 heads added up")):
        tiles: Callable[[AttentionSpec], str | None] = backend.varlen_tiles if packed else backend.tiles
        found = tiles(spec)
        assert found is not None
        assert (text in found) == (said or (not packed and heads == 4))
