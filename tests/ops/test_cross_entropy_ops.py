"""The losses as torch ops: derivatives, transforms, autocast, opcheck, compilation, and bad input by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from allocations import Allocations
from loss_operands import (
    REDUCTIONS,
    TOKENS,
    VOCAB,
    WIDTH,
    all_logits,
    linear,
    losses_and_grads,
    operands,
    targets,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastattn
from fastattn.backends.torch import softmax as torch_softmax
from numerics import assert_within_rule


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.filterwarnings("ignore:fastattn materialises all logits")
def test_gradcheck_and_gradgradcheck(reduction: str) -> None:
    hidden, weight, bias = (t[..., :3].detach().requires_grad_() for t in operands())
    hidden, weight, bias = hidden[:4], weight[:5], operands()[2][:5]
    target = torch.tensor([0, 4, -100, 2])
    options: dict[str, Any] = {"label_smoothing": 0.2, "reduction": reduction}

    def of_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(hidden, weight, target, bias=bias, softcap=3.0, **options)

    def of_logits(logits: Tensor) -> Tensor:
        return fastattn.cross_entropy(logits, target, **options)

    for function, leaves in (
        (of_linear, (hidden, weight, bias)),
        (of_logits, ((hidden @ weight.T).detach(),)),
    ):
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


@pytest.mark.filterwarnings("ignore:fastattn materialises all logits")
def test_transforms_match_torch() -> None:
    hidden, weight, _ = operands(grad=False)
    target = targets(TOKENS)
    for ours, theirs in (
        (lambda h: fastattn.linear_cross_entropy(h, weight, target), lambda h: all_logits(h, weight, target)),
        (lambda h: fastattn.cross_entropy(h @ weight.T, target), lambda h: all_logits(h, weight, target)),
    ):
        torch.testing.assert_close(*(torch.func.jvp(f, (hidden,), (hidden,)) for f in (ours, theirs)))
        torch.testing.assert_close(*(torch.func.grad(f)(hidden) for f in (ours, theirs)))
        batch = torch.stack([hidden, 2 * hidden])
        torch.testing.assert_close(*(torch.func.vmap(f)(batch) for f in (ours, theirs)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_under_autocast_the_weights_gradient_is_rounded_nowhere(reduction: str, with_bias: bool) -> None:
    """The weight stays float32 outside the op: its gradient is the sum in float32 of products of 16-bit factors."""
    hidden, weight, bias = operands(torch.float32)
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    target = targets(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *grads = linear(fastattn.linear_cross_entropy, leaves, target, reduction=reduction)
        plain = linear(all_logits, leaves, target, reduction=reduction)
    golden = linear(
        all_logits, [t.detach().double().requires_grad_() for t in leaves], target, reduction=reduction
    )
    for name, *three in zip(("loss", "dhidden", "dweight", "dbias"), (loss, *grads), plain, golden):
        assert three[0].dtype == torch.float32
        assert_within_rule(*three, name, dtype=torch.bfloat16)
    if reduction != "none":
        assert not torch.equal(grads[1], grads[1].bfloat16().float())


REDUCED = {
    "cross_entropy": lambda h, w, t, **o: fastattn.cross_entropy(h @ w.T, t, **o),
    "linear_cross_entropy": fastattn.linear_cross_entropy,
}


@pytest.mark.parametrize("function", REDUCED.values(), ids=REDUCED)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_backward_of_a_loss_has_the_same_bits(function: Callable[..., Tensor], reduction: str) -> None:
    """The first backward takes what the forward made, a later one makes it again, also after another scale."""
    hidden, weight, _ = operands(torch.float32)
    loss = function(hidden, weight, targets(TOKENS), reduction=reduction)
    first, scaled, again = (
        torch.autograd.grad(loss, [hidden, weight], torch.tensor(scale), retain_graph=True)
        for scale in (1.0, 4.0, 1.0)
    )
    for one, four, later in zip(first, scaled, again):
        assert torch.equal(one, later)
        torch.testing.assert_close(four, 4 * one)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reduced_loss_allocates_one_gradient_and_blocks(
    dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_softmax.BLOCK_ELEMENTS, "cpu", 4 * 300)
    logits, target = torch.randn(64, 300).to(dtype).requires_grad_(), targets(64, vocab=300)
    with Allocations() as allocated:
        fastattn.cross_entropy(logits, target, reduction=reduction).backward()
    whole = logits.numel() * logits.element_size()
    assert [size for size in allocated.sizes if size >= whole] == [
        whole,
        whole,
    ]  # the second: scaled out of place under this mode


@pytest.mark.parametrize(("with_bias", "weighted"), [(False, False), (True, True), (False, True)])
def test_opcheck(with_bias: bool, weighted: bool) -> None:
    hidden, weight, bias = operands(torch.float32)
    warnings.filterwarnings("ignore", "fastattn materialises all logits")
    target, ops = targets(TOKENS), torch.ops.fastattn
    class_weight = torch.rand(VOCAB) if weighted else None
    call = (
        hidden,
        weight,
        bias if with_bias else None,
        target,
        -100,
        0.1,
        3.0,
        class_weight,
        1e-2 * weighted,
    )
    needs = [True, True, with_bias]
    losses, norms = ops.linear_cross_entropy_fwd(
        *(t.detach() if isinstance(t, Tensor) else t for t in call), "auto"
    )
    opcheck(ops.linear_cross_entropy_fwd.default, (*call, "auto"))
    for divisor in (None, torch.tensor(9)):
        opcheck(ops.linear_cross_entropy_sum.default, (*call, divisor, needs, "auto"))
    opcheck(
        ops.linear_cross_entropy_bwd.default, (losses.clone().requires_grad_(), norms, *call, needs, "auto")
    )
    if not with_bias:
        logits = torch.randn(TOKENS, VOCAB, requires_grad=True)
        of_logits = (logits, target, -100, 0.1, *call[-2:], "auto")
        opcheck(ops.cross_entropy_fwd.default, of_logits)
        for mean in (False, True):
            opcheck(ops.cross_entropy_mean.default, (*of_logits[:-1], mean, "auto"))
        opcheck(
            ops.cross_entropy_bwd.default,
            (losses.clone().requires_grad_(), norms, *of_logits),
        )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile_without_breaks_or_recompiles_across_lengths(reduction: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def losses(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        fused = fastattn.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        return fused + fastattn.cross_entropy(hidden @ weight.T, target, reduction=reduction)

    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    for step, length in enumerate((5, 17, 300, 64)):
        hidden, target = torch.randn(length, WIDTH, requires_grad=True), targets(length)
        results = [losses_and_grads(f(hidden, weight, target), [hidden, weight]) for f in (compiled, losses)]
        for a, e in zip(*results):
            torch.testing.assert_close(a, e)
        if step == 1:
            counter.frame_count = 0
    assert counter.frame_count == 0


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_one_program_serves_every_number_of_classes_in_any_layout(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def losses(logits: Tensor, target: Tensor) -> Tensor:
        if name == "cross_entropy":
            return fastattn.cross_entropy(logits, target)
        return fastattn.linear_cross_entropy(torch.ones(5, 2), logits.T[:, :2], target)

    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    for step, classes in enumerate((10, 11, 12, 40)):
        logits = torch.randn(5, classes, 2, requires_grad=True)
        target = torch.randint(2 if name == "linear_cross_entropy" else classes, (5,))
        results = [losses_and_grads(f(logits[..., 0], target), [logits]) for f in (compiled, losses)]
        for a, e in zip(*results):
            torch.testing.assert_close(a, e)
        if step == 1:
            counter.frame_count = 0
    assert counter.frame_count == 0


LOGITS, HIDDEN, WEIGHT = torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(4, 2)
TARGET = torch.zeros(3, dtype=torch.long)
BAD = {
    "logits": ({"logits": [1.0]}, TypeError, "logits: got list, needs a torch.Tensor"),
    "integer logits": ({"logits": LOGITS.int()}, TypeError, "logits: got torch.int32, needs a float dtype"),
    "scalar logits": ({"logits": LOGITS[0, 0]}, ValueError, r"logits: got shape \(\), needs \(V,\), "),
    "no classes": ({"logits": LOGITS[:, :0]}, ValueError, r"logits: got shape \(3, 0\), needs at least one class"),
    "probabilities": ({"target": LOGITS}, TypeError, "target: got torch.float32, needs integers"),
    "target shape": ({"target": TARGET[:2]}, ValueError, r"target: got shape \(2,\), needs \(3,\) for logits of shape"),
    "target device": ({"target": TARGET.to("meta")}, ValueError, "target: got device meta, needs that of logits, cpu"),
    "target too large": ({"target": TARGET + 4}, ValueError, "target: got 4, needs 0 to 3 or -100 to be ignored"),
    "target negative": ({"target": TARGET - 1}, ValueError, "target: got -1, needs 0 to 3 or -100 to be ignored"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, "ignore_index: got float, needs an int"),
    "label_smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5, needs 0 to 1"),
    "label_smoothing type": ({"label_smoothing": None}, TypeError, "label_smoothing: got NoneType, needs a number"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: got 'avg', needs none, mean, sum"),
}  # fmt: skip
BAD_LINEAR = {
    "hidden": ({"hidden": HIDDEN.int()}, TypeError, "hidden: got torch.int32"),
    "scalar hidden": ({"hidden": HIDDEN[0, 0]}, ValueError, r"hidden: got shape \(\), needs \(..., E\)"),
    "weight": ({"weight": WEIGHT[:, :1]}, ValueError, r"weight: got shape \(4, 1\), needs \(V, 2\) for hidden of"),
    "weight dtype": ({"weight": WEIGHT.half()}, TypeError, "weight: got torch.float16, needs hidden's torch.float32"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight: got device meta, needs hidden's cpu"),
    "bias": ({"bias": torch.zeros(3)}, ValueError, r"bias: got shape \(3,\), needs \(4,\)"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap: got 0.0, needs a positive finite number"),
    "target": ({"target": TARGET[:2]}, ValueError, r"target: got shape \(2,\), needs \(3,\) for hidden of"),
    "target too large": ({"target": TARGET + 4}, ValueError, "target: got 4, needs 0 to 3"),
}  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_by_name(change: str) -> None:
    arguments, error, message = BAD[change]
    with pytest.raises(error, match=message):
        fastattn.cross_entropy(**{"logits": LOGITS, "target": TARGET, **arguments})


@pytest.mark.parametrize("change", BAD_LINEAR)
def test_bad_linear_input_is_refused_by_name(change: str) -> None:
    arguments, error, message = BAD_LINEAR[change]
    with pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, **arguments})
