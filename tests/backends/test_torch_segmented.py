"""Segments as sequences of their own: the error rule, dropout's stream, and what is left to the tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends.torch import segmented, short
from numerics import assert_each_within_rule

HEADS, SEQLEN = 4, 41


def runs(*rows: list[tuple[int, int]]) -> Tensor:
    """(B, SEQLEN) ids from (id, length) of the runs of each row, -1 behind them."""
    filled = [[i for i, length in row for _ in range(length)] for row in rows]
    return torch.tensor([ids + [-1] * (SEQLEN - len(ids)) for ids in filled], dtype=torch.int32)


LAYOUTS: dict[str, Tensor] = {
    "padded right": runs([(0, 41)], [(0, 17)], [(0, 1)]),
    "padded left": runs([(0, 41)], [(-1, 20), (0, 21)], [(-1, 40), (0, 1)]),
    "documents": runs([(0, 7), (1, 1), (2, 33)], [(5, 20), (3, 16)], [(9, 41)]),
    "gaps": runs([(0, 7), (-1, 5), (2, 9)], [(-1, 3), (4, 8), (-2, 2), (1, 28)], [(0, 12)]),
    "nothing": runs([(0, 30)], [], [(1, 5)]),
}


def operands(kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value and the gradients of out and lse."""
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, SEQLEN, 16), (kv_heads, SEQLEN, 16), (kv_heads, SEQLEN, 12), (HEADS, SEQLEN, 12)
    made = [torch.randn(3, *shape, generator=generator).to(dtype) for shape in shapes]
    return [*made, torch.randn(3, HEADS, SEQLEN, generator=generator)]


def results(attend: Any, tensors: list[Tensor], dropout_p: float = 0.2, **options: Any) -> dict[str, Tensor]:
    """out, lse and the gradients of query, key and value."""
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    seed = 7 if dropout_p else None
    out, lse = attend(*leaves, **options, return_lse=True, dropout_p=dropout_p, dropout_seed=seed)
    seen = lse.detach() > -math.inf
    dlse = torch.where(seen, tensors[4], 0).to(lse.dtype)
    grads = torch.autograd.grad((out, lse), leaves, [tensors[3].to(out.dtype), dlse])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads)))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass that came here, whether it gave the result."""
    found: list[bool] = []

    def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            result = run(*args)
            found.append(result is not None)
            return result

        return seen

    for name in ("attention_fwd", "attention_bwd"):
        monkeypatch.setattr(segmented, name, recorded(getattr(segmented, name)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_against_float64(
    name: str, causal: bool | str, kv_heads: int, dtype: torch.dtype, taken: list[bool]
) -> None:
    tensors, options = operands(kv_heads, dtype), {"segment_ids": LAYOUTS[name], "causal": causal}
    actual = results(fastattn.attention, tensors, **options, backend="torch")
    assert taken == [True, True]

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(reference.attention, [t.to(dtype) for t in tensors], **options)

    assert_each_within_rule(actual, lambda: formula(dtype), formula(torch.float64), name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_16_bit_gradients_without_dropout(name: str, dtype: torch.dtype, taken: list[bool]) -> None:
    tensors, options = operands(2, dtype), {"segment_ids": LAYOUTS[name], "causal": True, "dropout_p": 0.0}
    actual = results(fastattn.attention, tensors, **options, backend="torch")
    assert taken == [True]  # the forward is the fused kernel's

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(reference.attention, [t.to(dtype) for t in tensors], **options)

    assert_each_within_rule(actual, lambda: formula(dtype), formula(torch.float64), name, dtype)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_may_hold_anything(name: str, taken: list[bool]) -> None:
    ids, tensors = LAYOUTS[name], operands(4)
    expected = results(fastattn.attention, tensors, segment_ids=ids, backend="torch")
    hidden = (ids < 0)[:, None, :, None]
    poisoned = [t.masked_fill(hidden, math.nan) for t in tensors[:3]]
    found = results(fastattn.attention, [*poisoned, *tensors[3:]], segment_ids=ids, backend="torch")
    assert taken == [True] * 4
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("layout", ["BSHD", "HBSD"])
def test_any_layout(layout: str) -> None:
    tensors, options = operands(2), {"causal": True, "segment_ids": LAYOUTS["gaps"], "backend": "torch"}
    expected = results(fastattn.attention, tensors, **options)
    dims = (0, 2, 1, 3) if layout == "BSHD" else (1, 0, 2, 3)  # each its own inverse
    others = [t.permute(dims).contiguous().permute(dims) for t in tensors[:4]]
    found = results(fastattn.attention, [*others, tensors[4]], **options)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert found["out"].permute(dims).is_contiguous()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_long_segments_run_alone(
    name: str, dropout_p: float, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = operands(4, torch.float32 if dropout_p else torch.bfloat16)
    options = {"segment_ids": LAYOUTS[name], "causal": True, "dropout_p": dropout_p, "backend": "torch"}
    expected = results(fastattn.attention, tensors, **options)
    monkeypatch.setattr(short, "ELEMENTS", HEADS * 32 * 32)
    short._batches.cache_clear()
    taken.clear()
    found = results(fastattn.attention, tensors, **options)
    short._batches.cache_clear()
    # a long segment's dropout does not count from 0, but where it is a row's first
    assert all(taken) == (not dropout_p or name != "documents")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


OTHERS = {
    "an id with two runs": {
        "segment_ids": runs([(0, 5), (1, 5), (0, 5)], [(3, 9), (-1, 2), (3, 9)], [(0, 1), (1, 2), (0, 9)])
    },
    "other segments of keys": {"segment_ids": (LAYOUTS["documents"], LAYOUTS["gaps"])},
    "a window": {"segment_ids": LAYOUTS["documents"], "window": (5, 0)},
    "a softcap": {"segment_ids": LAYOUTS["documents"], "softcap": 5.0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_run_by_tiles(name: str, taken: list[bool]) -> None:
    tensors, options = operands(4), OTHERS[name]
    actual = results(fastattn.attention, tensors, **options, backend="torch")
    assert not any(taken)

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(reference.attention, [t.to(dtype) for t in tensors], **options)

    assert_each_within_rule(
        actual, lambda: formula(torch.float32), formula(torch.float64), name, torch.float32
    )


ODD = {
    "an id with two runs": (HEADS, [(0, 5), (1, 5), (0, 5)]),
    "a long document behind another": (HEADS, [(0, 3), (1, 38)]),
    "no segment": (HEADS, []),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", LAYOUTS)
def test_another_row_of_the_batch_changes_no_bit(
    name: str, odd: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short, "ELEMENTS", HEADS * 32 * 32)  # 38 tokens are long
    short._batches.cache_clear()
    tensors = operands(2, torch.float32 if dropout_p else torch.bfloat16)
    ids = torch.cat([LAYOUTS[name][:2], runs(ODD[odd][1])])
    options = {"causal": True, "dropout_p": dropout_p, "backend": "torch"}
    together = results(fastattn.attention, tensors, segment_ids=ids, **options)
    alone = results(fastattn.attention, [t[:1] for t in tensors], segment_ids=ids[:1], **options)
    two = results(fastattn.attention, [t[:2] for t in tensors], segment_ids=ids[:2], **options)
    short._batches.cache_clear()
    for key, value in together.items():
        assert torch.equal(value[:1], alone[key]), key
        assert torch.equal(value[:2], two[key]), key
