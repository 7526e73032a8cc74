"""Linear is torch's, with or without oneDNN: same class to its users, same result, same gradients, same refusals."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn import torch_compat
from fastattn.nn import linear as module
from fastattn.nn.linear import Linear, linear
from fastattn.torch_compat import products
from numerics import assert_within_rule, plain_in_any_order

needs_onednn = pytest.mark.skipif(not torch_compat.has_onednn_linear(), reason="this torch has no oneDNN")
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")


@pytest.fixture
def calls(monkeypatch):
    """How many calls went to oneDNN, all sizes allowed."""
    monkeypatch.setattr(module, "ONEDNN_MIN_WEIGHTS", 0)
    seen = []
    suits = module._suits_onednn
    monkeypatch.setattr(module, "_suits_onednn", lambda *args: suits(*args) and not seen.append(1))
    return seen


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (3, 24), (2, 5, 24), (2, 0, 24), (2, 1, 3, 24)])
def test_same_result(calls, shape, bias):
    torch.manual_seed(0)
    theirs = nn.Linear(24, 40, bias=bias)
    torch.manual_seed(0)
    ours = Linear(24, 40, bias=bias)
    assert isinstance(ours, nn.Linear)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    x = torch.randn(shape)
    golden = F.linear(x.double(), ours.weight.double(), None if not bias else ours.bias.double())
    with torch.no_grad():
        actual, plain = ours(x), plain_in_any_order(lambda: theirs(x), golden)
    assert actual.shape == plain.shape
    assert len(calls) == (x.numel() > 0)
    assert_within_rule(actual, plain, golden)


@needs_onednn
def test_strided_operands(calls):
    x, weight = torch.randn(6, 4, 16).transpose(0, 1)[..., ::2], torch.randn(8, 20).T[:, :8]
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), x @ weight.T)
        torch.testing.assert_close(linear(torch.randn(8).expand(3, 8), weight).shape, torch.Size([3, 20]))
    assert len(calls) == 2


class Wrapped(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "case", ["dtype", "autocast", "subclass", "functorch", "small", "flop counter", "trace"]
)
def test_everything_else_is_torchs(calls, monkeypatch, case):
    layer, x = Linear(16, 8), torch.randn(2, 16)
    expected = F.linear(x, layer.weight, layer.bias).detach()
    with torch.no_grad():
        if case == "dtype":
            out = layer.double()(x.double()).float()
        elif case == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x)
            assert out.dtype == torch.bfloat16
            expected = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
        elif case == "subclass":
            out = layer(x.as_subclass(Wrapped))
            assert type(out) is Wrapped
        elif case == "functorch":
            out = torch.func.vmap(layer)(x)
        elif case == "flop counter":
            with FlopCounterMode(display=False) as counter:
                out = layer(x)
            assert counter.get_total_flops() == 2 * 2 * 16 * 8
        elif case == "trace":
            out = torch.jit.trace(layer, x, check_trace=False)(x)
        elif case == "small":
            monkeypatch.setattr(module, "ONEDNN_MIN_WEIGHTS", 16 * 8 + 1)
            out = layer(x)
    golden = F.linear(x.double(), layer.weight.double(), layer.bias.double()).detach()
    assert_within_rule(out.detach().as_subclass(torch.Tensor), expected, golden)
    assert calls == []


def test_shapes_that_do_not_fit_are_torchs_to_refuse(calls):
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.randn(2, 7), torch.randn(3, 8))
    assert calls == []


@pytest.mark.parametrize("mkl", [False, True])
def test_gradients_keep_the_error_rule(mkl, calls, monkeypatch):
    monkeypatch.setattr(torch_compat, "ONEDNN_MIN_PRODUCTS", 0)
    monkeypatch.setattr(products, "prefers_mkl", lambda: mkl)
    x, layer = torch.randn(3, 40, 24, requires_grad=True), Linear(24, 16)
    dout = torch.randn(3, 40, 16)

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *layer.parameters())]
        return torch.autograd.grad(function(*leaves), leaves, dout.to(dtype))

    golden = gradients(F.linear, torch.float64)
    for number, actual in enumerate(gradients(linear, torch.float32)):
        plain = plain_in_any_order(lambda n=number: gradients(F.linear, torch.float32)[n], golden[number])
        assert_within_rule(actual, plain, golden[number])
    assert len(calls) == torch_compat.has_onednn_linear()


@needs_onednn
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 32, 33])
def test_a_step_s_rows_are_onednn_s_and_those_of_a_prompt_whose_is_faster(rows, intel, calls, monkeypatch):
    used = []
    monkeypatch.setattr(torch_compat, "has_mkl_on_intel", lambda: intel)
    for name in ("onednn_linear", "large_linear"):
        monkeypatch.setattr(torch_compat, name, lambda *args, name=name: used.append(name))
    with torch.no_grad():
        linear(torch.randn(rows, 16), torch.randn(8, 16), repeated=True)
    assert used == (["onednn_linear"] if rows <= 32 and not (intel and rows == 1) else ["large_linear"])


@needs_mkl
@pytest.mark.parametrize(
    ("avx512", "maker", "mkl"),
    [(True, "GenuineIntel", True), (True, "AuthenticAMD", False), (False, "AuthenticAMD", True)],
)
def test_mkl_is_preferred_where_it_uses_all_vector_instructions(avx512, maker, mkl, monkeypatch):
    monkeypatch.setattr(products, "_avx512", lambda: avx512)
    monkeypatch.setattr(products.Path, "exists", lambda path: True)
    monkeypatch.setattr(products.Path, "read_text", lambda path, **_: f"vendor_id : {maker}")
    monkeypatch.setattr(products, "has_mkl_on_intel", products.has_mkl_on_intel.__wrapped__)
    assert products.has_mkl_on_intel() is (maker == "GenuineIntel")
    assert products.prefers_mkl.__wrapped__() is mkl


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=str)
def test_remade_inputs_give_the_same_bits_and_derivatives_and_are_not_kept(calls, monkeypatch, frozen):
    """An activation and a norm before a layer, made again in the backward, beside the same kept by autograd."""
    monkeypatch.setattr(torch_compat, "ONEDNN_MIN_PRODUCTS", 0)
    leaves = [torch.randn(shape) for shape in ((5, 24), (16, 24), (16,))]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number not in frozen)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def results(before):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            h = before(leaves[0])
            out = linear(h, *leaves[1:]).square().sum()
        first = torch.autograd.grad(out, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, retain_graph=True)
        return h.data_ptr() in kept, torch.autograd.grad(out, wanted), second

    again, actual, second = results(lambda x: module.remade(torch.sin, x))
    kept, expected, expected_second = results(torch.sin)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    torch.testing.assert_close(second, expected_second)
    if torch_compat.has_onednn_linear() and 0 not in frozen:
        assert kept
        assert not again


@needs_onednn
def test_what_a_layer_needs_of_a_changed_source_is_refused(calls):
    x, weight = torch.randn(5, 24, requires_grad=True).clone(), torch.randn(16, 24, requires_grad=True)
    out = linear(module.remade(torch.sin, x), weight).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(("changed", "function"), [("result", torch.sin), ("source", F.relu)])
def test_an_input_that_is_changed_in_place_is_not_remade(calls, changed, function):
    """What is changed is what the function's own gradient has no need of."""
    weight = torch.randn(16, 24, requires_grad=True)

    def gradients(before):
        leaf = torch.linspace(-1, 1, 5 * 24).view(5, 24).requires_grad_()
        source = leaf * 1
        result = before(source)
        {"result": result, "source": source}[changed].detach().mul_(0.5)
        return torch.autograd.grad(linear(result, weight).square().sum(), [leaf, weight])

    for actual, expected in zip(gradients(lambda x: module.remade(function, x)), gradients(function)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kept", ["replaced", "freed"])
def test_a_remade_result_is_a_plain_tensor_that_keeps_no_source(kept):
    x = torch.randn(5, 24, requires_grad=True).clone()
    h = module.remade(F.relu, x)
    assert not vars(h)
    source = weakref.ref(x)
    if kept == "replaced":
        module.remade(F.relu, torch.randn(2, 2, requires_grad=True))
    else:
        del h
    del x
    gc.collect()
    assert source() is None


@needs_onednn
def test_a_shape_that_comes_again_goes_to_onednn_earlier(monkeypatch):
    rows, products = module.REPEATED_MIN_ROWS, module.REPEATED_MIN_PRODUCTS
    seen = []
    product = torch_compat.onednn_linear
    monkeypatch.setattr(torch_compat, "onednn_linear", lambda *args: seen.append(1) or product(*args))
    weight = torch.randn(products // rows // 256, 256)
    assert weight.numel() < module.ONEDNN_MIN_WEIGHTS
    for count, repeated, expected in ((rows, True, 1), (rows - 1, True, 0), (rows, False, 0)):
        x = torch.randn(count, 256)
        torch.testing.assert_close(linear(x, weight, repeated=repeated), F.linear(x, weight))
        assert len(seen) == expected, (count, repeated)
        seen.clear()
    linear(torch.randn(rows, 255), weight[:, :255], repeated=True)  # fewer products
    assert not seen
