"""`cross_entropy` and `linear_cross_entropy` against torch's and float64 on the torch backend, and their memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from loss_operands import (
    DTYPES,
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

import fastattn
from fastattn.backends import linear_cross_entropy as chunked
from fastattn.backends.torch import softmax as torch_softmax
from numerics import assert_each_within_rule, assert_within_rule


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

    def results(function: Callable[..., torch.Tensor], kind: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        made = linear(function, leaves, target, reduction=reduction, softcap=5.0)
        return dict(zip(("loss", "dhidden", "dweight", "dbias"), made))

    actual = results(fastattn.linear_cross_entropy, dtype)
    assert all(t.dtype == dtype for t in actual.values())
    golden = results(all_logits, torch.float64)
    assert_each_within_rule(actual, lambda: results(all_logits, dtype), golden, reduction, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e4])
@pytest.mark.usefixtures("blocks")
def test_losses_of_targets_far_below_the_largest_logit(dtype: torch.dtype, offset: float) -> None:
    """Their probabilities, from which the forward that makes the gradient takes losses, lose digits or are 0."""
    far = torch.tensor([0.0, 1, 10, 60, 68, 70, 86, 88, 100, 104, 110, 300, 700, 800, 5000])
    logits = torch.randn(len(far), VOCAB)
    logits[:, 3] = 4.0
    logits[:, 5] = 4.0 - far
    logits = (logits + offset).to(dtype).requires_grad_()
    target = torch.full((len(far),), 5)
    losses = torch.stack([fastattn.cross_entropy(z[None], t[None]) for z, t in zip(logits, target)])
    naive = F.cross_entropy(logits, target, reduction="none")
    golden = F.cross_entropy(logits.double(), target, reduction="none")
    for near in (far < 65, far > 65):
        assert_within_rule(losses[near], naive[near], golden[near], "losses", dtype=dtype)
    whole = fastattn.cross_entropy(logits, target, reduction="sum")
    assert_within_rule(whole, naive.sum(), golden.sum(), "their sum", dtype=dtype)
    torch.testing.assert_close(torch.autograd.grad(whole, logits), torch.autograd.grad(golden.sum(), logits))


def test_a_target_whose_logit_is_not_finite() -> None:
    logits = torch.zeros(1, 4)
    for number, loss in ((-math.inf, math.inf), (math.inf, math.nan), (math.nan, math.nan)):
        logits[0, 2] = number
        for grad in (False, True):
            found = fastattn.cross_entropy(logits.detach().requires_grad_(grad), torch.tensor([2]))
            torch.testing.assert_close(found.detach(), torch.tensor(loss), equal_nan=True)


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


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes, also of what an op allocates inside, which a dispatch mode around it does not see."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(int(event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ignored", [0, 100])
def test_never_more_than_a_quarter_of_the_logits(ignored: int, reduction: str, softcap: float | None) -> None:
    tokens, vocab = 256, 4096
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(vocab, 16, requires_grad=True)
    target = torch.randint(0, vocab, (tokens,))
    target[:ignored] = -100

    def run() -> None:
        loss = fastattn.linear_cross_entropy(hidden, weight, target, reduction=reduction, softcap=softcap)
        loss.sum().backward()

    assert largest_allocation(run) == (tokens - ignored) * vocab * 4 // chunked.MIN_CHUNKS


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 1000])
@pytest.mark.parametrize("vocab", [1, 50_000, 2**30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_cover_every_token_once(dtype: torch.dtype, vocab: int, tokens: int) -> None:
    parts = list(chunked.chunks(tokens, vocab, "cpu", dtype))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    longest = max((part.stop - part.start for part in parts), default=0)
    times = chunked.NARROW_CHUNK if dtype.itemsize == 2 else 1
    assert longest <= max(1, times * chunked.CHUNK_LOGITS["cpu"] // vocab)
    assert len(parts) >= min(tokens, chunked.MIN_CHUNKS // times)


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
