"""A plan is used for the kind of call it was made for alone, and what is refused stays refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plan_cases import CU_SEQLENS, IDS, MASK, heads, in_order
from torch import Tensor

import fastattn
from fastattn.ops import plan


class Subclass(Tensor):
    pass


def test_changed_tensors_get_plans_of_their_own(hits: list[bool]) -> None:
    """Strides, offsets, dtypes, subclasses, negative views and gradients are all told apart."""
    tensors = heads(torch.float32)
    for _ in range(3):
        fastattn.attention(*tensors, causal=True)
    assert hits == [False, False, True]
    wide = [torch.zeros(*t.shape[:3], 16) for t in tensors]
    for whole, t in zip(wide, tensors):
        whole[..., ::2] = t
    odd = [whole[..., ::2] for whole in wide]
    negated = torch.complex(torch.zeros_like(tensors[0]), -tensors[0]).conj().imag
    assert negated.is_neg()
    expected = fastattn.attention(*tensors, causal=True)
    for changed in (
        odd, in_order(tensors), [t.as_subclass(Subclass) for t in tensors], [negated, *tensors[1:]],
        [tensors[0].mT.contiguous().mT, *tensors[1:]], [torch.nn.Parameter(t) for t in tensors],
    ):  # fmt: skip
        hits.clear()
        out = fastattn.attention(*changed, causal=True)
        assert not any(hits)
        torch.testing.assert_close(out.detach().as_subclass(Tensor), expected)
        assert out.requires_grad == changed[0].requires_grad


BAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"causal": True}, {"causal": 1}),
    ({"causal": False}, {"causal": 0}),
    ({"scale": 1.0}, {"scale": True}),
    ({"scale": 1}, {"scale": True}),
    ({"softcap": 1.0}, {"softcap": True}),
    ({"window": (1, 0)}, {"window": (True, False)}),
    ({"window": (1, 0)}, {"window": (1.0, 0.0)}),
    ({}, {"dropout_p": False}),
    ({}, {"dropout_p": torch.zeros(2)}),
    ({}, {"dropout_seed": "seven"}),
    ({"dropout_seed": 7}, {"dropout_seed": 7.0}),
    ({"dropout_p": 0.5, "dropout_seed": 7}, {"dropout_p": 0.5, "dropout_seed": 2**64}),
    ({}, {"backend": "fastest"}),
    ({}, {"return_weights": "max"}),
    ({}, {"nonsense": 1}),
    ({"mask": MASK}, {"mask": MASK.float()}),
    ({"mask": MASK}, {"mask": MASK[:5]}),
    ({"bias": MASK.float()}, {"bias": MASK}),
    ({"key_lengths": torch.tensor([3, 4])}, {"key_lengths": torch.tensor([3, 13])}),
    ({"key_lengths": torch.tensor([3, 4])}, {"key_lengths": torch.tensor([3, 2**40])}),
    ({"segment_ids": IDS}, {"segment_ids": IDS + 2**40}),
    ({"segment_ids": IDS}, {"segment_ids": (IDS, IDS, IDS)}),
    ({"sinks": torch.zeros(4)}, {"sinks": torch.zeros(4, dtype=torch.int64)}),
    ({"alibi_slopes": torch.zeros(4)}, {"alibi_slopes": torch.zeros(3)}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_refused_stays_refused_beside_a_plan(number: int) -> None:
    good, bad = BAD[number]
    tensors = heads(torch.float32)
    refused = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as error:
            fastattn.attention(*tensors, **bad)
        refused.append(str(error.value))
        for _ in range(3):
            fastattn.attention(*tensors, **good)
        assert plan.count() == 1
    assert refused[0] == refused[1]


def test_values_and_memory_are_looked_at_in_every_call() -> None:
    query, keys, values = heads(torch.float32)
    new = {"key": keys[:, :, :1].clone(), "value": values[:, :, :1].clone()}
    lengths = torch.tensor([3, 4], dtype=torch.int32)

    def decode(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **changes: Any) -> Any:
        return fastattn.attention_kv_cache(query, k_cache, v_cache, lengths, **{**new, **changes})

    for _ in range(3):
        decode(keys, values, lengths)
    assert plan.count() == 1
    before = keys.clone()
    for wrong in ([3, 12], [-1, 4]):
        with pytest.raises(ValueError, match="cache_lengths"):
            decode(keys, values, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="v_cache: got memory of k_cache"):
        decode(keys, keys, lengths)
    whole = torch.zeros(keys.numel() + 8)
    with pytest.raises(ValueError, match="v_cache: got memory of k_cache"):
        decode(whole[: keys.numel()].view(keys.shape), whole[8:].view(keys.shape), lengths)
    with pytest.raises(ValueError, match="key: got memory of v_cache"):
        decode(keys, values, lengths, key=values.flatten()[: new["key"].numel()].view(new["key"].shape))
    assert torch.equal(keys, before)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="query: requires grad"):
        fastattn.attention_kv_cache(query.clone().requires_grad_(), keys, values, lengths, **new)
    tokens = [t.transpose(1, 2).flatten(0, 1) for t in (query, keys, values)]
    for _ in range(3):
        fastattn.attention_varlen(*tokens, CU_SEQLENS, CU_SEQLENS, 19, 19)
    for wrong, bound, name in (
        ([1, 5, 5, 24], 19, "cu_seqlens_q"),
        ([0, 5, 4, 24], 20, "cu_seqlens_q"),
        ([0, 5, 5, 25], 20, "cu_seqlens_q"),
        ([0, 2, 4, 24], 19, "max_seqlen_q"),
    ):
        with pytest.raises(ValueError, match=name):
            fastattn.attention_varlen(*tokens, torch.tensor(wrong, dtype=torch.int32), CU_SEQLENS, bound, 19)


def test_a_tensor_changed_in_place_before_the_backward_is_told() -> None:
    tensors = [t.requires_grad_() for t in heads(torch.float32)]
    for _ in range(3):
        out = fastattn.attention(*(t * 1 for t in tensors[:2]), scaled := tensors[2] * 1)
    scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
