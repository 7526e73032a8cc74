"""RMSNorm: the formula, its gradients by the error rule and by finite differences, and what runs it in other ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import linear as linear_module
from fastattn.nn.blocks import ACTIVATIONS, Mlp, gated_by
from fastattn.nn.norms import RMSNorm, normalised, rms_norm
from numerics import assert_within_rule

OFFSETS = pytest.mark.parametrize("unit_offset", [False, True])


def by_formula(x: Tensor, weight: Tensor, *, unit_offset: bool) -> Tensor:
    scale = 1 + weight if unit_offset else weight
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale


def results(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    """The output and both gradients of a weighted sum of it."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    out = function(x, weight)
    share = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * share).sum(), [x, weight])]


@OFFSETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_within_the_rule(
    unit_offset: bool, dtype: torch.dtype, strided: bool
) -> None:
    x = torch.randn(2, 5, 3, 40).to(dtype)
    x = x.transpose(1, 2) if strided else x
    weight = (torch.rand(40) - float(unit_offset)).to(dtype)
    actual = results(partial(rms_norm, eps=1e-6, unit_offset=unit_offset), x, weight)
    formula = partial(by_formula, unit_offset=unit_offset)
    plain, golden = results(formula, x, weight), results(formula, x.double(), weight.double())
    for name, *three in zip(("out", "dx", "dweight"), actual, plain, golden):
        assert_within_rule(*three, name, dtype)
    assert actual[0].dtype == dtype
    with torch.no_grad():
        assert_within_rule(rms_norm(x, weight, 1e-6, unit_offset=unit_offset), plain[0], golden[0])


@OFFSETS
def test_first_and_second_derivatives_by_finite_differences(unit_offset: bool) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    function = partial(rms_norm, eps=1e-6, unit_offset=unit_offset)
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))
    assert torch.autograd.gradcheck(lambda x: function(x, weight.detach()), (x,))
    assert torch.autograd.gradcheck(lambda w: function(x.detach(), w), (weight,))
    assert torch.autograd.gradcheck(partial(gated_by, F.silu), (torch.randn(3, 6).double().requires_grad_(),))
    assert torch.autograd.gradgradcheck(
        partial(gated_by, F.silu), (torch.randn(3, 6).double().requires_grad_(),)
    )


@pytest.mark.parametrize("name", ["norm", "gate"])
def test_transforms_forward_mode_and_compiled_code(name: str) -> None:
    weight = torch.rand(6, dtype=torch.float64)
    function = partial(rms_norm, weight=weight, eps=1e-6) if name == "norm" else partial(gated_by, F.silu)
    x, direction = torch.randn(2, 4, 6, dtype=torch.float64)
    of_sum = torch.func.grad(lambda x: function(x).sin().sum())
    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(plain).sin().sum(), plain)
    torch.testing.assert_close(of_sum(x), expected)
    torch.testing.assert_close(torch.func.vmap(of_sum)(x), expected)
    tangent = torch.func.jvp(lambda x: function(x).sin().sum(), (x,), (direction,))[1]
    torch.testing.assert_close(tangent, (expected * direction).sum())
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))


def test_a_row_has_the_same_bits_alone() -> None:
    x, weight = torch.randn(9, 72), torch.rand(72)
    with torch.no_grad():
        whole = rms_norm(x, weight, 1e-6)
        for row in range(9):
            assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], whole[row])


def test_a_new_norm_multiplies_by_one() -> None:
    x = torch.randn(3, 8)
    for unit_offset in (False, True):
        norm = RMSNorm(8, unit_offset=unit_offset)
        torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), eps=1e-6))
        assert ("unit_offset" in repr(norm)) == unit_offset
    assert rms_norm(x[:0], norm.weight, 1e-6).shape == (0, 8)


class Kept:
    """Bytes of the tensors that autograd keeps for the backward."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("unit_offset", [False, True])
def test_layers_behind_a_norm_and_a_gate_keep_neither_result(
    unit_offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backward keeps: the input, the product before the gate, and nothing else of the tokens' size."""
    monkeypatch.setattr(linear_module, "ONEDNN_MIN_WEIGHTS", 1)
    norm, mlp = RMSNorm(64, unit_offset=unit_offset), Mlp(64, 96, activation="silu", bias=False, gated=True)
    x, kept = torch.randn(200, 64, requires_grad=True), Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        out = mlp(normalised(norm, x))
    rows = 200 * 4
    weights = sum(p.numel() * 4 for p in (*norm.parameters(), *mlp.parameters()))
    assert sum(kept.sizes.values()) <= rows * (64 + 2 * 96 + 1) + weights + 64 * 4
    expected = torch.autograd.grad(out.sin().sum(), [x, *norm.parameters(), *mlp.parameters()])
    monkeypatch.undo()
    h = by_formula(x, norm.weight, unit_offset=unit_offset)
    gate, rest = (h @ mlp.c_fc.weight.T).chunk(2, -1)
    out = (F.silu(gate) * rest) @ mlp.c_proj.weight.T
    actual = torch.autograd.grad(out.sin().sum(), [x, *norm.parameters(), *mlp.parameters()])
    for ours, plain in zip(expected, actual):
        assert (ours - plain).norm() <= 64 * torch.finfo(torch.float32).eps * plain.norm()


def test_a_norm_with_hooks_or_of_another_kind_is_called() -> None:
    x, seen = torch.randn(2, 8), []
    norm = RMSNorm(8)
    norm.register_forward_hook(lambda *args: seen.append(1))
    normalised(norm, x)
    assert seen == [1]
    assert torch.equal(normalised(nn.Identity(), x), x)
    assert set(ACTIVATIONS) >= {"silu", "gelu_pytorch_tanh"}
