"""The torch backend, clause by clause of the contract, against float64."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from allocations import Allocations
from contract import CASES, SAMPLES, Case, Inputs, check
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.backends.torch import attention as backend
from fastattn.backends.torch import fused, parts
from fastattn.ops import plan
from fastattn.ops.arguments import call_arguments
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded
from numerics import assert_each_within_rule, assert_within_rule, plain_in_any_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, backend="torch", samples=SAMPLES if dtype == torch.float32 else 2)


@pytest.mark.parametrize("outputs", [("out",), ("lse",)], ids=lambda names: names[0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_from_one_result_alone(case: Case, outputs: tuple[str, ...]) -> None:
    """Without a gradient of lse the fused kernel serves the backward; without one of out, values get none."""
    check(case, torch.float32, outputs, backend="torch", samples=SAMPLES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_agrees_to_rounding(case: Case) -> None:
    inputs = Inputs.of(case, torch.float64)
    golden = inputs.run(fastattn.reference.attention, torch.float64)
    actual = inputs.run(fastattn.attention, torch.float64, backend="torch")
    for name, value in actual.items():
        torch.testing.assert_close(
            value, golden[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rows", [16, 32, 1000])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "causal",
        "grouped heads",
        "window both sides",
        "mask",
        "bias with -inf",
        "segments",
        "lengths",
        "everything",
    ],
)
def test_tile_sizes_change_nothing(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FUSED_SHARE_BYTES", 1)
    monkeypatch.setattr(parts, "FUSED_DENSE_ELEMENTS", 1)
    for constant in ("FUSED_ROW_BLOCK", "FUSED_DENSE_ROW_BLOCK", "ROW_BLOCK", "COL_BLOCK"):
        monkeypatch.setattr(parts, constant, rows)
    for constant in ("ROW_BLOCK", "COL_BLOCK"):
        monkeypatch.setattr(fused, constant, rows)
    case = next(case for case in CASES if case.name == name)
    check(case, torch.float32, backend="torch", samples=SAMPLES)
    check(case, torch.float32, ("out",), backend="torch", samples=SAMPLES)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dim", [8, 7], ids=["fused", "blockwise"])
def test_the_share_of_a_sink_has_no_rounding_of_large_logits(dim: int, rows: int) -> None:
    """Score and sink are both 1000, where a float32 has 14 bits for the fraction of 1000 + log(2)."""
    query, value = torch.ones(1, 2, rows, dim), torch.randn(1, 2, 1, dim)
    key = torch.zeros(1, 2, 1, dim)
    key[..., 0] = 1000
    sinks = torch.full((2,), 1000.0)
    out = fastattn.attention(query, key, value, sinks=sinks, scale=1.0, backend="torch")
    assert torch.equal(out, (value / 2).expand_as(out))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it were alive with at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key: int, nbytes: int) -> None:
        self.storages.discard(key)
        self.live -= nbytes


def _peak(length: int, options: dict[str, object]) -> int:
    """Bytes alive at most within a forward and backward of the backend itself, its results included."""
    q = torch.randn(1, 1, length, 8)
    call = AttentionCall(*call_arguments(q, q, q, **options))  # type: ignore[arg-type]
    with LiveBytes() as memory:
        out, lse = backend.attention_fwd(AttentionSpec.of(call), call)
        needs = GradsNeeded()
        backend.attention_bwd(AttentionSpec.of(call, needs), call, out, lse, out, None, needs)
    return memory.peak


def test_the_memory_tracker_sees_what_lives_together() -> None:
    with LiveBytes() as memory:
        for _ in range(5):
            torch.zeros(1000)
        kept = [torch.zeros(1000) for _ in range(3)]
    assert 12000 <= memory.peak <= 16000
    assert len(kept) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"window": (63, 0)},
        {"window": (None, 5)},
        {"causal": True},
        {"causal": True, "softcap": 4.0},
        {"causal": True, "mask": torch.rand(1, 1, 1, 1) < 2},
        {"dropout_p": 0.1, "dropout_seed": 1},
        {"alibi_slopes": torch.ones(1)},
        {"segment_ids": None},
    ],
    ids=["window", "right window", "causal", "softcap", "mask", "dropout", "alibi", "segments"],
)
def test_memory_grows_with_length_not_its_square(options: dict[str, object]) -> None:
    peaks = []
    for length in (1024, 4096):
        if "segment_ids" in options:
            options = {"segment_ids": torch.randint(0, 9, (1, length))}
        peaks.append(_peak(length, options))
    assert peaks[1] < 6 * peaks[0], "four times the length may cost four times the memory, not sixteen times"


@pytest.mark.parametrize("sink", [10.0, 20.0, -math.inf])
@pytest.mark.parametrize("length", [11, 64])
@pytest.mark.parametrize("outputs", [("out",), ("out", "lse")], ids=["out", "both"])
def test_large_and_absent_sinks(outputs: tuple[str, ...], length: int, sink: float) -> None:
    """Weights of 1e-9 beside the sink's keep their gradients; a sink of -inf is no sink, even in an empty row."""

    def options(make: object) -> dict[str, object]:
        mask = torch.ones(9, length, dtype=torch.bool)
        mask[3] = False
        return {"sinks": torch.full((4,), sink), "mask": mask}

    case = Case(f"sink {sink}", options, seqlen_q=9, seqlen_k=length, head_dim=8, value_dim=8)
    inputs = Inputs.of(case, torch.float32)
    golden = inputs.run(fastattn.reference.attention, torch.float64, outputs)
    formula = partial(inputs.run, fastattn.reference.attention, torch.float32, outputs)
    actual = inputs.run(fastattn.attention, torch.float32, outputs, backend="torch")
    assert_each_within_rule(actual, formula, golden, str(case), torch.float32)


@pytest.mark.parametrize("length", [9, 64, 700])
@pytest.mark.parametrize("grad", [False, True], ids=["bias", "bias with gradient"])
def test_rows_whose_bias_is_the_smallest_number(length: int, grad: bool) -> None:
    """Masks made of finfo.min leave rows whose keys have equal weights; lse has no digits left for their number."""
    torch.manual_seed(2)
    bias = torch.zeros(6, length)
    bias[2] = torch.finfo(torch.float32).min
    q, k, v = (torch.randn(1, 2, s, 16) for s in (6, length, length))
    dout = torch.randn(1, 2, 6, 16)

    def run(attend: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, weights = attend(*leaves, bias=bias.to(dtype).requires_grad_(grad), return_weights=True)
        return [out, weights, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    golden = run(fastattn.reference.attention, torch.float64)
    plain = plain_in_any_order(partial(run, fastattn.reference.attention, torch.float32), golden)
    torch.testing.assert_close(golden[0][:, :, 2], v.double().mean(2))
    for three in zip(run(fastattn.attention, torch.float32), plain, golden):
        assert_within_rule(*three)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_are_repeated_for_some_heads_at_a_time(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where heads share them, in the backward; no bit depends on how many at a time."""
    query, dout = (torch.randn(1, 8, 64, 16) for _ in range(2))
    key, value = (torch.randn(1, 4, 64, 16) for _ in range(2))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = fastattn.attention(*leaves, causal=causal, backend="torch")
    whole = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    monkeypatch.setattr(fused, "FUSED_SHARE_BYTES", 1)
    with Allocations() as allocated:
        grads = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(one, other) for one, other in zip(grads, whole))
    assert sum(size >= 4 * query.numel() for size in allocated.sizes) == 1  # the query's gradient


def test_a_tiles_mask_is_made_once_for_all_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the backward takes the heads in several runs."""
    monkeypatch.setattr(fused, "FUSED_SHARE_BYTES", 1)
    monkeypatch.setattr(parts, "FUSED_DENSE_ELEMENTS", 1)
    made = []

    def counted(part: parts.Part, tile: Any) -> torch.Tensor | None:
        made.append(tile.rows)
        return fused.fused_mask(part, tile)

    monkeypatch.setattr(backend, "fused_mask", counted)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 256, 16, requires_grad=True) for _ in range(3))
    mask = torch.rand(256, 256) > 0.3
    fastattn.attention(query, key, value, mask=mask, backend="torch").sum().backward()
    assert made == [range(128), range(128, 256)]


def test_hidden_keys_stay_hidden_behind_slopes_that_overflow() -> None:
    """A negative slope's term of a far key is +inf, which adding -inf would make NaN."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 16) for _ in range(3))
    slopes = torch.full((2,), -1e38)
    out = fastattn.attention(query, key, value, causal=True, alibi_slopes=slopes, backend="torch")
    assert torch.equal(out[:, :, 0], value[:, :, 0])
    assert out[:, :, :3].isfinite().all()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_as_sequences_change_no_bit(
    batch: int, causal: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous tensors of many elements, by a plan and without one: results of the same bits in their order."""
    torch.manual_seed(0)
    query, dout = (torch.randn(batch, 4, 130, 64) for _ in range(2))
    key, value = (torch.randn(batch, kv_heads, 130, 64) for _ in range(2))
    results = []
    for least in (2**30, 0):
        monkeypatch.setattr(fused, "SEQUENCES_MIN_ELEMENTS", least)
        plan.clear()
        for _ in range(3):
            tensors = [t.clone().requires_grad_() for t in (query, key, value)]
            out, lse = fastattn.attention(*tensors, causal=causal, return_lse=True, backend="torch")
            results.append([out, lse, *torch.autograd.grad(out, tensors, dout)])
    for other in results[1:]:
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(results[0], other))
    plan.clear()
