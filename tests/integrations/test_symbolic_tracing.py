"""Symbolic tracing takes modules and functions of fastattn whole; TorchScript says what to do instead."""

from typing import Any
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
from export_cases import padded, qkv, targets
from torch import Tensor, nn
from torch.fx.proxy import TraceError

import fastattn


class Mixed(nn.Module):
    """Modules and functions of attention, as a model calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out, weights = self.attn(x, x, x, key_padding_mask=padding)
        return out + F.scaled_dot_product_attention(x, x, x) + weights.sum()


def test_symbolic_tracing_takes_a_swapped_module_whole_as_torchs() -> None:
    model, (x, padding) = Mixed().eval(), padded(2, 7)
    expected = torch.fx.symbolic_trace(model)
    fastattn.swap_attention(model)
    with fastattn.sdpa_override():
        actual = torch.fx.symbolic_trace(model)
    assert targets(actual.graph) == targets(expected.graph)
    assert [n.kwargs for n in actual.graph.find_nodes(op="call_module", target="attn")] == [
        {"key_padding_mask": ANY}
    ]
    assert isinstance(actual.attn, fastattn.MultiHeadAttention)
    torch.testing.assert_close(actual(x, padding), model(x, padding))
    with pytest.raises(TraceError, match="trace a module that contains it"):
        torch.fx.symbolic_trace(model.attn)


def test_symbolic_tracing_records_functions_with_the_arguments_given() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Any:
        attended = fastattn.attention(q, k, v, causal=True, return_lse=True)
        packed = fastattn.attention_varlen(q[0].mT, k[0].mT, v[0].mT, cu_seqlens, cu_seqlens, 5)
        cached = fastattn.attention_kv_cache(q, k, v, cu_seqlens)
        dots = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
        probs = fastattn.softmax(q, 1, log=True)
        losses = (
            fastattn.cross_entropy(q, cu_seqlens),
            fastattn.linear_cross_entropy(q, k, cu_seqlens, softcap=2.0),
        )
        return attended[0], packed, cached, dots, probs, losses

    graph = torch.fx.symbolic_trace(function).graph
    recorded = {
        node.target.__name__: node.kwargs
        for node in graph.nodes
        if node.op == "call_function" and node.target.__module__.startswith("fastattn")
    }
    given = {name: set(kwargs) for name, kwargs in recorded.items()}
    assert given == {
        "attention": {"query", "key", "value", "causal", "return_lse"},
        "attention_varlen": {"query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"},
        "attention_kv_cache": {"query", "k_cache", "v_cache", "cache_lengths"},
        "scaled_dot_product_attention": {"query", "key", "value", "is_causal"},
        "softmax": {"x", "dim", "log"},
        "cross_entropy": {"logits", "target"},
        "linear_cross_entropy": {"hidden", "weight", "target", "softcap"},
    }
    module = torch.fx.symbolic_trace(lambda q, k, v: fastattn.attention(q, k, v, causal=True))
    torch.testing.assert_close(module(*qkv()), fastattn.attention(*qkv(), causal=True))


def test_torchscript_names_what_helps() -> None:
    model = Mixed()
    fastattn.swap_attention(model)
    with pytest.raises(RuntimeError, match=r"fastattn\.restore_attention\(model\)"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match="restore_attention"):
        torch.jit.script(fastattn.MultiHeadAttention(32, 4))
    fastattn.restore_attention(model)
    torch.jit.script(model.attn)
