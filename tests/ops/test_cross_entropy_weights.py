"""Class weights and z-loss of `cross_entropy` and `linear_cross_entropy`: torch's results, derivatives, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from loss_operands import torchs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import reference
from fastattn.backends import linear_cross_entropy as chunked
from fastattn.backends.torch import cross_entropy as torch_cross_entropy
from fastattn.backends.torch import softmax as torch_softmax
from fastattn.spec import SoftmaxSpec
from numerics import assert_within_rule

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, VOCAB, WIDTH = 13, 37, 8
EXTRAS: dict[str, dict[str, Any]] = {
    "class weights": {"class_weight": True},
    "z-loss": {"z_loss": 0.02},
    "both, smoothing": {"class_weight": True, "z_loss": 0.02, "label_smoothing": 0.2},
}


def extras_of(name: str) -> dict[str, Any]:
    """The options of a case; the first class weighs nothing."""
    options = dict(EXTRAS[name])
    if "class_weight" in options:
        options["class_weight"] = 3 * torch.rand(VOCAB, dtype=torch.float64)
        options["class_weight"][0] = 0.0
    return options


def operands(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    target = torch.randint(0, VOCAB, (TOKENS,))
    target[1::3], target[0] = -100, 0
    leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return leaves, target


def with_grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(-3, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else None
    return [loss, *torch.autograd.grad(loss, leaves, upstream)]


@pytest.fixture(params=[1, 2**20], ids=["row by row", "whole"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_softmax.BLOCK_ELEMENTS, "cpu", request.param)
    monkeypatch.setitem(chunked.CHUNK_LOGITS, "cpu", request.param)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(VOCAB,), (TOKENS, VOCAB), (2, VOCAB, 3, 2)], ids=str)
@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.usefixtures("blocks")
def test_cross_entropy_is_torchs(name: str, shape: tuple[int, ...], reduction: str) -> None:
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    target = torch.tensor(5)
    if len(shape) > 1:
        target = torch.randint(0, VOCAB, (*shape[:1], *shape[2:]))
        target.view(-1)[1::3] = -100
    options = extras_of(name) | {"reduction": reduction}
    actual = with_grads(fastattn.cross_entropy(logits, target, **options), [logits])
    assert actual[0].shape == (target.shape if reduction == "none" else ())
    for a, e in zip(actual, with_grads(torchs(logits, target, **options), [logits])):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.usefixtures("blocks")
def test_linear_cross_entropy_is_that_of_all_logits(name: str, reduction: str) -> None:
    (hidden, weight, bias), target = operands()
    options = extras_of(name) | {"reduction": reduction, "ignore_index": 7}
    target = target.masked_fill(target == -100, 7)
    leaves = [hidden, weight, bias]
    ours = fastattn.linear_cross_entropy(hidden, weight, target, bias=bias, softcap=3.0, **options)
    logits = 3.0 * torch.tanh(F.linear(hidden, weight, bias) / 3.0)
    for a, e in zip(with_grads(ours, leaves), with_grads(torchs(logits, target, **options), leaves)):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", loss_cases.OPTIONS)
def test_error_rule(name: str, dtype: torch.dtype) -> None:
    call, upstream = loss_cases.inputs(dtype, 64, 300, loss_cases.OPTIONS[name])
    spec = SoftmaxSpec.of(call.logits)
    losses, norms = torch_cross_entropy.cross_entropy_fwd(spec, call)
    dlogits = torch_cross_entropy.cross_entropy_bwd(spec, call, upstream, norms)
    loss_cases.assert_as_torchs(call, upstream, losses, dlogits)


@pytest.mark.parametrize("name", EXTRAS)
def test_the_oracle_is_torchs(name: str) -> None:
    logits = torch.randn(TOKENS, VOCAB, dtype=torch.float64)
    _, target = operands()
    options = extras_of(name)
    actual = reference.cross_entropy(logits, target, **options)
    torch.testing.assert_close(actual, torchs(logits, target, **options, reduction="none"))


def test_the_mean_of_z_loss_is_not_weighted() -> None:
    """Weights of any scale give one cross-entropy, and z_loss keeps its strength."""
    logits, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, -100])
    weight = torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    expected = F.cross_entropy(logits, target, weight) + 0.1 * logits[:2].logsumexp(1).square().mean()
    for scale in (1.0, 100.0):
        loss = fastattn.cross_entropy(logits, target, class_weight=scale * weight, z_loss=0.1)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("target", [[-100, -100], [0, 0], [0, -100]], ids=["ignored", "weightless", "both"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_mean_of_no_weight_is_nan_without_gradient(target: list[int], z_loss: float) -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = fastattn.cross_entropy(
        logits, torch.tensor(target), class_weight=torch.tensor([0.0, 1, 1]), z_loss=z_loss
    )
    assert loss.isnan()
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_ignored_tokens_may_hold_nan() -> None:
    (hidden, weight, _), target = operands()
    options = extras_of("both, smoothing")
    clean = with_grads(fastattn.linear_cross_entropy(hidden, weight, target, **options), [hidden, weight])
    with torch.no_grad():
        hidden[target == -100] = math.nan
    again = with_grads(fastattn.linear_cross_entropy(hidden, weight, target, **options), [hidden, weight])
    for a, b in zip(again, clean):
        assert torch.equal(a, b)


def test_weights_of_one_and_no_z_loss_change_nothing() -> None:
    logits, target = torch.randn(TOKENS, VOCAB), operands()[1]
    for smoothing in (0.0, 0.1):
        plain = fastattn.cross_entropy(logits, target, label_smoothing=smoothing)
        ones = fastattn.cross_entropy(
            logits, target, label_smoothing=smoothing, class_weight=torch.ones(VOCAB), z_loss=0.0
        )
        torch.testing.assert_close(ones, plain)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64], ids=str)
def test_weights_of_any_float_dtype(kind: torch.dtype) -> None:
    logits, target = torch.randn(TOKENS, VOCAB), operands()[1]
    weight = torch.rand(2 * VOCAB)[::2].half()
    loss = fastattn.cross_entropy(logits, target, class_weight=weight.to(kind))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, weight.float()))
    assert loss.dtype == torch.float32


def test_autocast() -> None:
    (hidden, weight, _), target = operands(torch.float32)
    options = {"class_weight": torch.rand(VOCAB), "z_loss": 1e-2}
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastattn.linear_cross_entropy(hidden, weight, target, **options)
        logits = F.linear(hidden, weight)
    assert loss.dtype == torch.float32
    exact = {"class_weight": options["class_weight"].double(), "z_loss": options["z_loss"]}
    golden = torchs(F.linear(hidden.double(), weight.double()), target, **exact)
    assert_within_rule(loss, torchs(logits.float(), target, **options), golden, dtype=torch.bfloat16)
    assert torch.autograd.grad(loss, hidden)[0].dtype == torch.float32


# Derivatives and transforms


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.filterwarnings("ignore:fastattn materialises all logits")
def test_gradcheck_and_gradgradcheck(reduction: str) -> None:
    target = torch.tensor([0, 4, -100, 2])
    options: dict[str, Any] = {
        "label_smoothing": 0.2, "reduction": reduction, "z_loss": 0.05, "class_weight": torch.rand(5).double(),
    }  # fmt: skip
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def of_linear(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(hidden, weight, target, softcap=3.0, **options)

    def of_logits(logits: Tensor) -> Tensor:
        return fastattn.cross_entropy(logits, target, **options)

    checks: tuple[tuple[Callable[..., Tensor], tuple[Tensor, ...]], ...] = (
        (of_linear, (hidden, weight)), (of_logits, (logits,))
    )  # fmt: skip
    for function, leaves in checks:
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.filterwarnings("ignore:fastattn materialises all logits")
def test_transforms_and_compiled_code(name: str) -> None:
    (hidden, weight, _), target = operands()
    hidden, weight, options = hidden.detach(), weight.detach(), extras_of(name)

    def theirs(h: Tensor) -> Tensor:
        return torchs(h @ weight.T, target, **options)

    def fused(h: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(h, weight, target, **options)

    def of_logits(h: Tensor) -> Tensor:
        return fastattn.cross_entropy(h @ weight.T, target, **options)

    batch, leaf = torch.stack([hidden, 2 * hidden]), hidden.clone().requires_grad_()
    for ours in (fused, of_logits):
        torch.testing.assert_close(*(torch.func.jvp(f, (hidden,), (hidden,)) for f in (ours, theirs)))
        torch.testing.assert_close(*(torch.func.grad(f)(hidden) for f in (ours, theirs)))
        torch.testing.assert_close(*(torch.func.vmap(f)(batch) for f in (ours, theirs)))
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(*(with_grads(f(leaf), [leaf]) for f in (compiled, theirs)))


def test_class_weights_under_vmap() -> None:
    logits, target = torch.randn(TOKENS, VOCAB, dtype=torch.float64), operands()[1]
    weights = torch.rand(2, VOCAB, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="materialises all logits"):
        losses = torch.func.vmap(
            lambda w: fastattn.cross_entropy(logits, target, class_weight=w, z_loss=0.1)
        )(weights)
    for loss, weight in zip(losses, weights):
        torch.testing.assert_close(loss, torchs(logits, target, class_weight=weight, z_loss=0.1))


def test_flops_do_not_depend_on_them() -> None:
    (hidden, weight, _), target = operands(torch.float32)
    counts = []
    for options in ({}, {"class_weight": torch.rand(VOCAB), "z_loss": 0.1}):
        with FlopCounterMode(display=False) as counter:
            fastattn.linear_cross_entropy(hidden, weight, target, **options).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * TOKENS * VOCAB * WIDTH


# Bad input

LOGITS, HIDDEN, WEIGHT = torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(4, 2)
TARGET = torch.zeros(3, dtype=torch.long)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"class_weight": [1.0] * 4}, TypeError, "class_weight: got list, needs a torch.Tensor"),
    "integers": ({"class_weight": TARGET}, TypeError, "class_weight: got torch.int64, needs a float dtype"),
    "shape": ({"class_weight": torch.ones(3)}, ValueError, r"class_weight: got shape \(3,\), needs \(4,\)"),
    "rank": ({"class_weight": torch.ones(1, 4)}, ValueError, r"class_weight: got shape \(1, 4\), needs \(4,\)"),
    "device": ({"class_weight": torch.ones(4).to("meta")}, ValueError, "class_weight: got device meta, needs that of"),
    "grad": ({"class_weight": torch.ones(4, requires_grad=True)}, RuntimeError, "class_weight: requires grad"),
    "negative": ({"z_loss": -0.1}, ValueError, "z_loss: got -0.1, needs a finite number, 0 or more"),
    "infinite": ({"z_loss": math.inf}, ValueError, "z_loss: got inf, needs a finite number"),
    "nan": ({"z_loss": math.nan}, ValueError, "z_loss: got nan, needs a finite number"),
    "beyond float32": ({"z_loss": 1e39}, ValueError, r"z_loss: got 1e\+39, needs a finite number"),
    "tensor": ({"z_loss": torch.tensor(0.1)}, TypeError, "z_loss: got Tensor, needs a number"),
    "bool": ({"z_loss": True}, TypeError, "z_loss: got bool, needs a number"),
    "None": ({"z_loss": None}, TypeError, "z_loss: got NoneType, needs a number"),
    "bool targets": ({"target": TARGET.bool()}, TypeError, r"target: got torch.bool, needs integers"),
    "float targets": ({"target": TARGET.float()}, TypeError, r"target: got torch.float32, needs integers"),
}  # fmt: skip


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_by_name(change: str, linear: bool) -> None:
    arguments, error, message = BAD[change]
    function: Any = fastattn.linear_cross_entropy if linear else fastattn.cross_entropy
    operands = (HIDDEN, WEIGHT) if linear else (LOGITS,)
    with pytest.raises(error, match=f"^{message}"):
        function(*operands, **{"target": TARGET, **arguments})


def test_weights_that_require_grad_are_fine_without_gradients() -> None:
    weight = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        assert not fastattn.cross_entropy(LOGITS, TARGET, class_weight=weight).requires_grad


@pytest.mark.filterwarnings("ignore:fastattn materialises all logits")
def test_a_target_that_is_no_class_names_itself_under_transforms() -> None:
    target = torch.tensor([0, 4, -100])
    for function in (
        lambda logits: fastattn.cross_entropy(logits, target),
        lambda logits: fastattn.linear_cross_entropy(logits, torch.eye(4), target),
    ):
        for transformed in (torch.func.grad(function), lambda x, f=function: torch.func.vmap(f)(x[None])):
            with pytest.raises(IndexError, match="target: got 4, needs 0 to 3 or -100 to be ignored"):
                transformed(LOGITS)


@pytest.mark.parametrize("error", [ValueError, IndexError])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_target_that_is_no_class_names_itself(wrong: int, compiled: bool, error: type[Exception]) -> None:
    """Whoever catches torch's IndexError still does; one at fault among many is found, through a plan too."""
    right = torch.full((100,), -100)
    right[50] = 3
    target = right.clone()
    target[77] = wrong
    hidden, logits = torch.zeros(100, 2, requires_grad=True), torch.zeros(100, 4, requires_grad=True)
    calls: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: fastattn.cross_entropy(torch.zeros(100, 4), t),
        lambda t: fastattn.cross_entropy(logits, t),
        lambda t: fastattn.cross_entropy(logits, t, class_weight=torch.ones(4), reduction="sum"),
        lambda t: fastattn.cross_entropy(torch.zeros(100, 4), t, class_weight=torch.ones(4), z_loss=0.1),
        lambda t: fastattn.linear_cross_entropy(torch.zeros(100, 2), WEIGHT, t, reduction="none"),
        lambda t: fastattn.linear_cross_entropy(hidden, WEIGHT, t),
    )
    for call in calls:
        run = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
        for _ in range(0 if compiled else 3):
            run(right)
        with pytest.raises(error, match=f"target: got {wrong}, needs 0 to 3 or -100 to be ignored"):
            run(target)
