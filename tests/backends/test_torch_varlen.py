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
