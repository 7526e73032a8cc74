"""`cross_entropy` and `linear_cross_entropy` against torch's and float64 on the torch backend, and their memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from allocations import Allocations
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastattn
from fastattn.backends import linear_cross_entropy as chunked
from fastattn.backends.torch import softmax as torch_softmax
from numerics import assert_within_rule

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, VOCAB, WIDTH = 13, 37, 8


def targets(*shape: int, ignore_index: int = -100, vocab: int = VOCAB) -> Tensor:
    """Random classes; every third token is ignored."""
    target = torch.randint(0, vocab, shape)
    target.view(-1)[1::3] = ignore_index
    return target


def operands(dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def all_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, softcap: float | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """linear_cross_entropy with torch's operations on all logits."""
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.movedim(-1, 1) if logits.dim() > 2 else logits, target, **options)


def losses_and_grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients for an uneven upstream gradient."""
    upstream = (
        torch.linspace(-3, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        if loss.dim()
        else loss.new_tensor(2.5)
    )
    return [loss, *torch.autograd.grad(loss, leaves, upstream)]


def linear(
    function: Callable[..., Tensor], leaves: list[Tensor], target: Tensor, **options: Any
) -> list[Tensor]:
    hidden, weight, *bias = leaves
    return losses_and_grads(
        function(hidden, weight, target, bias=bias[0] if bias else None, **options), leaves
    )


@pytest.fixture(params=[1, 100, 2**20], ids=["row by row", "two rows", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_softmax.BLOCK_ELEMENTS, "cpu", request.param)
    monkeypatch.setitem(chunked.CHUNK_LOGITS, "cpu", request.param)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(VOCAB,), (TOKENS, VOCAB), (2, VOCAB, 3, 2)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_cross_entropy_is_torchs(shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    target = targets(*shape[:1], *shape[2:]) if len(shape) > 1 else torch.tensor(5)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    actual = losses_and_grads(fastattn.cross_entropy(logits, target, **options), [logits])
    expected = losses_and_grads(F.cross_entropy(logits, target, **options), [logits])
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("blocks")
def test_linear_cross_entropy_is_that_of_all_logits(
    with_bias: bool, softcap: float | None, reduction: str
) -> None:
    leaves = operands()[: 3 if with_bias else 2]
    target = targets(TOKENS, ignore_index=7)
    options: dict[str, Any] = {
        "ignore_index": 7,
        "label_smoothing": 0.1,
        "softcap": softcap,
        "reduction": reduction,
    }
    for a, e in zip(
        *(linear(f, leaves, target, **options) for f in (fastattn.linear_cross_entropy, all_logits))
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_error_rule(dtype: torch.dtype, smoothing: float, reduction: str) -> None:
    logits, target = (5 * torch.randn(64, 300)).to(dtype), targets(64, vocab=300)
    results = []
    for function, kind in (
        (fastattn.cross_entropy, dtype),
        (F.cross_entropy, dtype),
        (F.cross_entropy, torch.float64),
    ):
        leaf = logits.to(kind).requires_grad_()
        results.append(
            losses_and_grads(function(leaf, target, label_smoothing=smoothing, reduction=reduction), [leaf])
        )
    for name, *three in zip(("losses", "dlogits"), *results):
        assert three[0].dtype == dtype
        assert_within_rule(*three, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_error_rule(dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_LOGITS, "cpu", 3 * VOCAB)
    inputs, target = operands(dtype), targets(TOKENS)
    results = []
    for function, kind in (
        (fastattn.linear_cross_entropy, dtype), (all_logits, dtype), (all_logits, torch.float64)
    ):  # fmt: skip
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        results.append(linear(function, leaves, target, reduction=reduction, softcap=5.0))
    for name, *three in zip(("loss", "dhidden", "dweight", "dbias"), *results):
        assert three[0].dtype == dtype
        assert_within_rule(*three, name)


def test_small_upstream_gradients_survive_half_precision() -> None:
    """A mean over many tokens of fp16: gradients are rounded once, after all the scaling."""
    hidden, weight = torch.randn(512, 8).half().requires_grad_(), torch.randn(64, 8).half().requires_grad_()
    target = torch.randint(0, 64, (512,))
    scaled = fastattn.linear_cross_entropy(hidden, weight, target) * 2.0**7
    dweight = torch.autograd.grad(scaled, weight)[0]
    double = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(all_logits(*double, target) * 2.0**7, double[1])[0]
    plain = torch.autograd.grad(all_logits(hidden, weight, target) * 2.0**7, weight)[0]
    assert_within_rule(dweight, plain, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_targets_ignored(reduction: str) -> None:
    leaves, target = operands(), torch.full((TOKENS,), -100)
    logits = torch.randn(TOKENS, VOCAB, requires_grad=True)
    for loss, sources in (
        (fastattn.linear_cross_entropy(*leaves[:2], target, reduction=reduction), leaves[:2]),
        (fastattn.cross_entropy(logits, target, reduction=reduction), [logits]),
    ):
        assert bool(loss.isnan() if reduction == "mean" else (loss == 0).all())
        for grad in torch.autograd.grad(loss.sum(), sources):
            assert not grad.any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_tokens_may_hold_nan(reduction: str) -> None:
    leaves, target = operands(), targets(TOKENS)
    clean = linear(fastattn.linear_cross_entropy, leaves, target, reduction=reduction)
    with torch.no_grad():
        leaves[0][target == -100] = math.nan
    for a, b in zip(linear(fastattn.linear_cross_entropy, leaves, target, reduction=reduction), clean):
        assert torch.equal(a, b)
    logits = torch.randn(TOKENS, VOCAB).masked_fill((target == -100)[:, None], math.nan).requires_grad_()
    loss, grad = losses_and_grads(fastattn.cross_entropy(logits, target, reduction=reduction), [logits])
    assert not loss.isnan().any()
    assert not grad[target == -100].any()
    assert not grad.isnan().any()


def test_no_tokens() -> None:
    hidden, weight, _ = operands()
    target = torch.zeros(0, dtype=torch.long)
    assert fastattn.linear_cross_entropy(hidden[:0], weight, target).isnan()
    assert fastattn.linear_cross_entropy(hidden[:0], weight, target, reduction="sum") == 0
    assert fastattn.cross_entropy(torch.zeros(0, 5), target).isnan()


def test_leading_dims_and_integer_dtypes() -> None:
    hidden, weight, _ = operands()
    target = torch.randint(0, VOCAB, (TOKENS,))
    losses = fastattn.linear_cross_entropy(hidden, weight, target, reduction="none")
    folded = fastattn.linear_cross_entropy(
        hidden[:12].view(3, 4, -1), weight, target[:12].view(3, 4).int(), reduction="none"
    )
    torch.testing.assert_close(folded, losses[:12].view(3, 4))
    assert fastattn.linear_cross_entropy(hidden[0], weight, target[0], reduction="none").shape == ()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_never_more_than_a_quarter_of_the_logits(reduction: str, softcap: float | None) -> None:
    tokens, vocab = 256, 4096
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(vocab, 16, requires_grad=True)
    target = torch.randint(0, vocab, (tokens,))
    with Allocations() as made:
        loss = fastattn.linear_cross_entropy(hidden, weight, target, reduction=reduction, softcap=softcap)
        loss.sum().backward()
    assert max(made.sizes) <= tokens * vocab * 4 // chunked.MIN_CHUNKS
    assert max(made.sizes) >= vocab * 16 * 4  # the weight's gradient is seen


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 1000])
@pytest.mark.parametrize("vocab", [1, 50_000, 2**30])
def test_chunks_cover_every_token_once(tokens: int, vocab: int) -> None:
    parts = list(chunked.chunks(tokens, vocab, "cpu"))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    longest = max((part.stop - part.start for part in parts), default=0)
    assert longest <= max(1, chunked.CHUNK_LOGITS["cpu"] // vocab)
    assert len(parts) >= min(tokens, chunked.MIN_CHUNKS)


def test_the_graph_is_freed_or_kept_as_asked() -> None:
    leaves, target = operands(), targets(TOKENS)
    loss = fastattn.linear_cross_entropy(*leaves[:2], target)
    first = torch.autograd.grad(loss, leaves[:2], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss * 3, leaves[:2])):
        torch.testing.assert_close(3 * a, b)


def test_only_the_asked_for_gradients() -> None:
    hidden, weight, bias = operands(grad=False)
    loss = fastattn.linear_cross_entropy(hidden, weight.requires_grad_(), targets(TOKENS), bias=bias)
    loss.backward()
    assert weight.grad is not None
    assert hidden.grad is None
    assert not fastattn.linear_cross_entropy(hidden, weight.detach(), targets(TOKENS)).requires_grad


def test_autocast() -> None:
    leaves, target = operands(torch.float32), targets(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastattn.linear_cross_entropy(*leaves[:2], target)
        theirs = all_logits(*leaves[:2], target)
        assert fastattn.cross_entropy(leaves[1].bfloat16().T, target[:WIDTH] % VOCAB).dtype == torch.float32
    assert loss.dtype == theirs.dtype == torch.float32
    golden = all_logits(*(leaf.detach().double() for leaf in leaves[:2]), target)
    assert_within_rule(loss, theirs, golden, dtype=torch.bfloat16)
    assert torch.autograd.grad(loss, leaves[0])[0].dtype == torch.float32


# Derivatives and transforms


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


# As torch ops


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
        opcheck(ops.cross_entropy_mean.default, (*of_logits[:-1], torch.tensor(9), "auto"))
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
