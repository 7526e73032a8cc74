"""Sparse tensors where dense ones belong: every op refuses each of its tensors by name, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.integrations import flash_attn

B, H, S, D, V = 2, 2, 4, 8, 6
INT32 = torch.int32


def heads() -> Tensor:
    return torch.randn(B, H, S, D)


def tokens() -> Tensor:
    return torch.randn(B * S, H, D)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=INT32)


MODULE = fastattn.MultiHeadAttention(H * D, H, batch_first=True)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (fastattn.attention, {
        "query": heads(), "key": heads(), "value": heads(), "mask": torch.ones(S, S).bool(),
        "bias": torch.zeros(S, S), "segment_ids": torch.zeros(B, S, dtype=INT32), "key_lengths": lengths(3, 4),
        "alibi_slopes": torch.rand(H), "sinks": torch.rand(H), "dropout_seed": torch.tensor([5]), "dropout_p": 0.5,
    }),
    "attention_varlen": (fastattn.attention_varlen, {
        "query": tokens(), "key": tokens(), "value": tokens(), "cu_seqlens_q": lengths(0, 4, 8),
        "cu_seqlens_k": lengths(0, 4, 8), "alibi_slopes": torch.rand(H), "sinks": torch.rand(H),
        "dropout_seed": torch.tensor([5]), "dropout_p": 0.5,
    }),
    "attention_kv_cache": (fastattn.attention_kv_cache, {
        "query": heads(), "k_cache": heads(), "v_cache": heads(), "cache_lengths": lengths(0, 0), "key": heads(),
        "value": heads(), "block_table": lengths(0, 1)[:, None], "rotary_cos": torch.rand(S, 2),
        "rotary_sin": torch.rand(S, 2), "alibi_slopes": torch.rand(H), "sinks": torch.rand(H),
    }),
    "scaled_dot_product_attention": (fastattn.scaled_dot_product_attention, {
        "query": heads(), "key": heads(), "value": heads(), "attn_mask": torch.zeros(S, S),
    }),
    "softmax": (fastattn.softmax, {"x": torch.randn(3, 4), "mask": torch.ones(3, 4).bool()}),
    "cross_entropy": (fastattn.cross_entropy, {
        "logits": torch.randn(B, V), "target": lengths(1, 2), "class_weight": torch.rand(V),
    }),
    "linear_cross_entropy": (fastattn.linear_cross_entropy, {
        "hidden": torch.randn(B, D), "weight": torch.randn(V, D), "target": lengths(1, 2), "bias": torch.rand(V),
        "class_weight": torch.rand(V),
    }),
    "MultiHeadAttention": (MODULE, {
        "query": torch.randn(B, S, H * D), "key": torch.randn(B, S, H * D), "value": torch.randn(B, S, H * D),
        "key_padding_mask": torch.zeros(B, S).bool(), "attn_mask": torch.zeros(S, S).bool(),
    }),
    "flash_attn_func": (flash_attn.flash_attn_func, {"q": heads(), "k": heads(), "v": heads()}),
    "unpad_input": (flash_attn.unpad_input, {
        "hidden_states": torch.randn(B, S, D), "attention_mask": torch.ones(B, S),
    }),
}  # fmt: skip
CASES = [
    (op, name) for op, (_, call) in CALLS.items() for name, value in call.items() if isinstance(value, Tensor)
]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_sparse_tensors_are_refused_by_name(op: str, name: str) -> None:
    function, call = CALLS[op]
    with pytest.raises(
        TypeError, match=rf"^{name}: got a tensor of layout torch\.sparse_coo, needs a dense one"
    ):
        function(**{**call, name: call[name].to_sparse()})


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_are_good_ones(op: str) -> None:
    function, call = CALLS[op]
    function(**call)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("convert", [Tensor.to_sparse_csr, Tensor.to_mkldnn], ids=["csr", "mkldnn"])
def test_every_other_layout(convert: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"^x: got a tensor of layout torch\.\w+, needs a dense one"):
        fastattn.softmax(convert(torch.randn(3, 4)))
    with pytest.raises(TypeError, match=r"^logits: got a tensor of layout torch\.\w+, needs a dense one"):
        fastattn.cross_entropy(convert(torch.randn(3, 4)), torch.tensor([0, 1, 2]))
