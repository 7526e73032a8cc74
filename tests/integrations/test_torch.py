"""`sdpa_override` reaches the calls that its docstring lists, and restores everything on leaving."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastattn
from fastattn.integrations import torch as integration
from fastattn.ops import sdpa as sdpa_module
from numerics import assert_within_rule

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


@pytest.mark.parametrize("shared", [False, True])
def test_threads_may_leave_in_any_order(calls, shared):
    """The first to enter leaves first: the other still runs on its backend, and nothing stays behind."""
    first = fastattn.sdpa_override("torch")
    second = first if shared else fastattn.sdpa_override()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with first:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with second:
        leave.set()
        thread.join()
        F.scaled_dot_product_attention(*qkv())
    assert F.scaled_dot_product_attention is ORIGINAL
    assert calls == ["torch" if shared else "auto"]


def test_entering_again_compiles_nothing_again():
    graphs = []
    torch._dynamo.reset()
    model = torch.compile(Calls(), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    x = torch.randn(2, 6, 16)
    for _ in range(4):
        with fastattn.sdpa_override():
            model(x)
        model(x)
    assert len(graphs) == 2


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


def test_what_fastattn_refuses_goes_to_torch_with_a_warning(calls):
    wide = qkv(300)
    expected = ORIGINAL(*wide)
    with fastattn.sdpa_override():
        with pytest.warns(RuntimeWarning, match="head dim over 256"):
            assert torch.equal(F.scaled_dot_product_attention(*wide), expected)
        with pytest.warns(RuntimeWarning, match="head dim of 0"):
            assert F.scaled_dot_product_attention(*qkv(0)).shape == (2, 4, 5, 0)
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


FLASH = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def registry():
    from torch.nn import attention

    if not hasattr(attention, "restore_flash_attention_impl"):
        pytest.skip("this torch has no registry of flash-attention implementations")
    yield attention
    attention.restore_flash_attention_impl(_raise_warn=False)


def test_registers_without_activating(registry):
    integration.register()
    integration.register()
    assert registry.list_flash_attention_impls().count("fastattn") == 1
    assert registry.current_flash_attention_impl() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="activation works with a GPU")
def test_activating_without_cuda_says_so(registry):
    integration.register()
    with pytest.raises(RuntimeError, match="CUDA"):
        registry.activate_flash_attention_impl("fastattn")
    assert registry.current_flash_attention_impl() is None


def test_activation_overrides_cuda_until_restored(registry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ours = fastattn.__name__ + "/torch_compat/attention.py"  # where the ops are registered

    def owner(name):
        return torch._C._dispatch_dump(name)

    names = (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_backward",
    )
    integration.register()
    before = [owner(name) for name in names]
    registry.activate_flash_attention_impl("fastattn")
    assert registry.current_flash_attention_impl() == "fastattn"
    assert all(ours in owner(name) for name in names)
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    assert [owner(name) for name in names] == before


@pytest.fixture
def on_the_cpu():
    """The overrides under the CPU's key, where torch has no such kernels: the dispatcher and autograd are real."""
    overrides = integration._FlashOverrides("CPU")
    yield overrides
    overrides.remove()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_overrides_meet_torchs_schema_and_autograd(on_the_cpu, causal, dropout_p):
    q, k, v = (torch.randn(2, h, s, 8, requires_grad=True) for h, s in ((4, 5), (2, 7), (2, 7)))
    torch.manual_seed(3)
    out, lse, _, _, max_q, max_k, rng_state, *_ = FLASH(q, k, v, dropout_p, causal, scale=0.3)
    seed = rng_state.view(torch.int64)[:1] if dropout_p else None
    options = {"causal": causal, "dropout_p": dropout_p, "dropout_seed": seed, "scale": 0.3}
    expected, expected_lse = fastattn.attention(q, k, v, **options, return_lse=True)
    assert (max_q, max_k) == (5, 7)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    weight = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad(o, (q, k, v), weight) for o in (out, expected))
    torch.testing.assert_close(actual, wanted)
    again = FLASH(q, k, v, dropout_p, causal, scale=0.3)[0]
    assert torch.equal(again, out) == (dropout_p == 0)


def test_the_overrides_refuse_and_go(on_the_cpu):
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="return_debug_mask"):
        FLASH(q, k, v, return_debug_mask=True)
    on_the_cpu.remove()
    with pytest.raises(NotImplementedError):
        FLASH(q, k, v)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_overrides_return_what_torchs_meta_kernels_say(on_the_cpu, transposed):
    """Compiled code plans with these: shapes, strides and dtypes of every result."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) if transposed else t for t in qkv())
    real, planned = (FLASH(*(t.to(device) for t in (q, k, v)), 0.3, True) for device in ("cpu", "meta"))
    kinds = [
        [(t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in results]
        for results in (real, planned)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_torchs_flash_path_is_fastattn(registry, dtype):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))

    def run():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return results(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), (q, k, v))

    def results(attend, leaves):
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

    dout = torch.randn(2, 4, 256, 64, device="cuda", dtype=dtype)
    formula = partial(fastattn.reference.attention, causal=True)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    plain, golden = results(formula, (q, k, v)), results(formula, doubles)
    integration.register()
    registry.activate_flash_attention_impl("fastattn")
    with torch.profiler.profile() as profile:
        actual = run()
    registry.restore_flash_attention_impl()
    for name, *three in zip(("out", "dq", "dk", "dv"), actual, plain, golden):
        assert_within_rule(*three, name)
    assert any("fastattn" in event.key for event in profile.key_averages())
