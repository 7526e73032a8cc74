"""`sdpa_override` reaches what it says it reaches, and leaves no trace."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastattn
from fastattn.ops import sdpa as sdpa_module

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """The backend of every call that fastattn's function gets."""
    seen = []
    attention = sdpa_module.attention
    monkeypatch.setattr(
        sdpa_module, "attention", lambda *a, **k: seen.append(k["backend"]) or attention(*a, **k)
    )
    return seen


def qkv(dim=8):
    return torch.randn(3, 2, 4, 5, dim).unbind()


def test_inside_it_is_fastattn_and_afterwards_torch(calls):
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with fastattn.sdpa_override():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        by_name = torch.nn.functional.scaled_dot_product_attention(
            query=q,
            key=k,
            value=v,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=True,
            scale=None,
            enable_gqa=False,
        )
    assert F.scaled_dot_product_attention is ORIGINAL
    torch.testing.assert_close((out, by_name), (expected, expected))
    assert calls == ["auto", "auto"]


def test_restores_after_an_exception():
    with pytest.raises(KeyError), fastattn.sdpa_override():
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL


def test_nests_and_reenters(calls):
    q, k, v = qkv()
    override = fastattn.sdpa_override()
    with override:
        outer = F.scaled_dot_product_attention
        with fastattn.sdpa_override("torch"), override:
            assert F.scaled_dot_product_attention is not outer
            F.scaled_dot_product_attention(q, k, v)
            with fastattn.sdpa_override("torch"):
                F.scaled_dot_product_attention(q, k, v)
        assert F.scaled_dot_product_attention is outer
        F.scaled_dot_product_attention(q, k, v)
    assert F.scaled_dot_product_attention is ORIGINAL
    assert calls == ["auto", "torch", "auto"]


def test_decorates(calls):
    @fastattn.sdpa_override("torch")
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    function(*qkv())
    assert calls == ["torch"]
    assert F.scaled_dot_product_attention is ORIGINAL


def test_all_threads_see_it(calls):
    with fastattn.sdpa_override():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv()))
        thread.start()
        thread.join()
    assert calls == ["auto"]


def test_a_named_backend_that_cannot_says_why(monkeypatch):
    from fastattn.backends import triton

    monkeypatch.setattr(triton, "why_not", lambda spec: "not today")
    with fastattn.sdpa_override("triton"), pytest.raises(RuntimeError, match="not today"):
        F.scaled_dot_product_attention(*qkv())
    with pytest.raises(ValueError, match="backend"):
        fastattn.sdpa_override("nope")


def grads(module, *inputs):
    out = module(*inputs)
    return out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))


@pytest.mark.parametrize("masked", [False, True])
def test_reaches_multihead_attention_and_encoder_layers_in_training(calls, masked):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if masked else None

    def run():
        out = layer(x, src_key_padding_mask=padding)
        return out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))

    expected = run()
    with fastattn.sdpa_override():
        actual = run()
    torch.testing.assert_close(actual, expected)
    assert len(calls) == 1
    attention = layer.self_attn.train()
    with fastattn.sdpa_override():
        attention(x, x, x, need_weights=False)
        attention(x, x, x, need_weights=True)  # torch computes weights itself
    assert len(calls) == 2


def test_the_inference_fast_path_is_out_of_reach_until_it_is_off(calls):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad(), fastattn.sdpa_override():
        layer(x)
        assert calls == []
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            layer(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert calls == ["auto"]


def test_an_imported_name_is_out_of_reach(calls):
    with fastattn.sdpa_override():
        ORIGINAL(*qkv())
    assert calls == []


def test_what_fastattn_refuses_goes_to_torch_with_a_warning(calls):
    wide = qkv(300)
    expected = ORIGINAL(*wide)
    with fastattn.sdpa_override():
        with pytest.warns(RuntimeWarning, match="head dim over 256"):
            assert torch.equal(F.scaled_dot_product_attention(*wide), expected)
        nested = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 5)], layout=torch.jagged)
        nested = nested.transpose(1, 2)
        with pytest.warns(RuntimeWarning, match="nested"):
            F.scaled_dot_product_attention(nested, nested, nested)
    assert calls == []


def test_what_torch_refuses_is_refused():
    q, k, v = qkv()
    with fastattn.sdpa_override():
        with pytest.raises(RuntimeError, match="attn_mask"):
            F.scaled_dot_product_attention(q, k, v, torch.zeros(5, 5), is_causal=True)
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(q, k, None)


class Calls(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Contains(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("module", "follows"), [(Calls, True), (Contains, False)])
def test_compiled_code(module, follows):
    """A call is followed in and out; inside nn.MultiheadAttention, a leaf to dynamo, what was compiled stays."""
    graphs = []

    def fused_calls():
        return ["fastattn.attention_fwd" in str(graph.code) for graph in graphs]

    torch._dynamo.reset()
    model, x = module(), torch.randn(2, 6, 16)
    compiler = aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(graph) or graph)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected)
    with fastattn.sdpa_override():
        torch.testing.assert_close(compiled(x), expected)
    assert fused_calls() == ([False, True] if follows else [False])
    graphs.clear()
    torch._dynamo.reset()
    with fastattn.sdpa_override():
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    assert fused_calls() == ([True, False] if follows else [True])
