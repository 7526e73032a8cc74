"""Packed sequences on the torch backend: the short way, one tile for each, gives the bits of the long one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastattn
from fastattn.backends.torch import varlen

LENGTHS = [8, 1, 0, 70, 128]
SHORT = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "scale": {"scale": 0.3},
}
LONG: dict[str, dict[str, Any]] = {
    "window": {"window": (5, 0)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.ones(4)},
    "slopes": {"alibi_slopes": torch.ones(4)},
    "a scale of 0": {"scale": 0.0},
}


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_bits_of_the_short_way(
    name: str, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    total, taken = sum(LENGTHS), []
    q, k, v = (torch.randn(total, heads, 16).to(dtype) for heads in (4, kv_heads, kv_heads))
    short = varlen._one_tile_each

    def seen(*args: Any) -> Any:
        taken.append(short(*args))
        return taken[-1]

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        options = {**SHORT, **LONG}[name]
        cu_seqlens = ends(LENGTHS)
        return fastattn.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, **options, return_lse=True, backend="torch"
        )

    monkeypatch.setattr(varlen, "_one_tile_each", seen)
    results = attend()
    assert [found is not None for found in taken] == [name in SHORT]
    monkeypatch.setattr(varlen, "_one_tile_each", lambda *args: None)
    expected = attend()
    for found in (results, attend(), attend()):  # the last by a plan
        for one, other in zip(found, expected):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "causal"),
    [([3, 4], [3, 9], True), ([3, 4], [0, 7], False), ([2, 3], [5, 2], False), ([0, 0], [3, 4], False)],
    ids=str,
)
def test_sequences_of_other_lengths(lengths_q: list[int], lengths_k: list[int], causal: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(sum(lengths_q) + 2, 2, 16)  # two tokens of no sequence
    k, v = (torch.randn(sum(lengths_k), 2, 16) for _ in range(2))
    out = fastattn.attention_varlen(q, k, v, ends(lengths_q), ends(lengths_k), causal=causal, backend="torch")
    assert not out[sum(lengths_q) :].any()
    of_each = zip(q.split([*lengths_q, 2]), k.split(lengths_k), v.split(lengths_k))
    for rows, operands in zip(out.split([*lengths_q, 2]), of_each):
        padded = (t.transpose(0, 1)[None] for t in operands)
        alone = fastattn.attention(*padded, causal=causal, backend="torch")[0].transpose(0, 1)
        assert torch.equal(rows, alone)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_takes_the_long_way(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(11, 2, 16) for _ in range(3))
    k[3, 0, 0] = bad
    results = fastattn.attention_varlen(q, k, v, ends([5, 6]), ends([5, 6]), return_lse=True, backend="torch")
    monkeypatch.setattr(varlen, "_one_tile_each", lambda *args: None)
    again = fastattn.attention_varlen(q, k, v, ends([5, 6]), ends([5, 6]), return_lse=True, backend="torch")
    for one, other in zip(results, again):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def results_of(
    lengths: list[int], tensors: list[torch.Tensor], heads: int = 2, **options: Any
) -> list[torch.Tensor]:
    """(out, dq, dk, dv) of sequences of these lengths, the first tokens of q, k, v and dout (T, heads, 16)."""
    leaves = [t[: sum(lengths), :heads].clone().requires_grad_() for t in tensors[:3]]
    cu_seqlens = ends(lengths)
    out = fastattn.attention_varlen(*leaves, cu_seqlens, cu_seqlens, backend="torch", **options)
    return [out, *torch.autograd.grad(out, leaves, tensors[3][: sum(lengths), :heads])]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [1, 16, 23, 200, 600, 800])
def test_others_change_no_bit_of_a_short_sequence(
    first: int, causal: bool, dropout_p: float, heads: int
) -> None:
    torch.manual_seed(0)
    lengths = [first, 17, 23, first, 3, 256]
    tensors = [torch.randn(sum(lengths), heads, 16) for _ in range(4)]
    options = {"causal": causal, "dropout_p": dropout_p, "dropout_seed": 5 if dropout_p else None}
    together = results_of(lengths, tensors, heads, **options)
    alone = results_of([first], tensors, heads, **options)
    for one, whole in zip(alone, together):
        assert torch.equal(one, whole[:first])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", range(4), ids=["query", "key", "value", "dout"])
def test_what_is_not_finite_stays_in_its_short_sequence(
    operand: int, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lengths = [20, 21, 22]
    tensors = [torch.randn(sum(lengths), 2, 16) for _ in range(4)]
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.3, "dropout_seed": 1}
    clean = results_of(lengths, tensors, **options)
    tensors[operand][25, 1, 3] = bad
    results = results_of(lengths, tensors, **options)
    monkeypatch.setattr(varlen.short, "can_run", lambda spec: False)
    one_by_one = results_of(lengths, tensors, **options)
    for found, before, expected in zip(results, clean, one_by_one):
        assert torch.equal(found[:20], before[:20])
        assert torch.equal(found[41:], before[41:])
        torch.testing.assert_close(found[20:41], expected[20:41], equal_nan=True)


def test_operations_do_not_grow_with_the_number_of_short_sequences() -> None:
    def operations(count: int) -> int:
        lengths = [20 + i % 10 for i in range(count)]
        tensors = [torch.randn(sum(lengths), 2, 16) for _ in range(4)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            results_of(lengths, tensors, dropout_p=0.1, dropout_seed=0)
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))

    operations(40)  # memory that is used again grows to what it needs
    assert operations(40) <= operations(4)
