"""The CUDA cross-entropy, host code and kernels, run by the emulation against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from cuda_emulation.extension import EmulatedExtension
from torch import Tensor

from fastattn.backends import linear_cross_entropy as chunked
from fastattn.backends.cuda import softmax as backend
from fastattn.backends.torch import cross_entropy as other
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec
from numerics import assert_within_rule, plain_in_any_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = range(3)


def inputs(dtype: torch.dtype, rows: int, classes: int, spread: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, target, upstream); one row is ignored and holds NaN."""
    logits = (spread * torch.randn(rows, classes)).to(dtype)
    target = torch.randint(0, classes, (rows,))
    target[1], logits[1] = -100, float("nan")
    return logits, target, torch.randn(rows)


def plain(logits: Tensor, target: Tensor, upstream: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    leaf = logits.masked_fill((target == -100)[:, None], 0).requires_grad_()
    losses = F.cross_entropy(leaf, target, label_smoothing=smoothing, reduction="none")
    return losses, torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))[0]


def run(logits: Tensor, target: Tensor, upstream: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    call, spec = CrossEntropyCall(logits, target, -100, smoothing), SoftmaxSpec.of(logits)
    losses, norms = backend.cross_entropy_fwd(spec, call)
    return losses, backend.cross_entropy_bwd(spec, call, upstream, norms)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 37, 64, 256, 257, 1024, 1025, 4103])
def test_error_rule(
    emulated_extension: EmulatedExtension, classes: int, dtype: torch.dtype, smoothing: float
) -> None:
    """Vocabularies on both sides of the thresholds of the plan, of parts of the backward, and of vectors."""
    arguments = (*inputs(dtype, 5, classes), smoothing)
    golden = plain(arguments[0].double(), arguments[1], arguments[2].double(), smoothing)
    naive = plain_in_any_order(partial(plain, *arguments), golden)
    results = []
    for seed in SEEDS:
        emulated_extension.configure(seed=seed)
        losses, dlogits = run(*arguments)
        assert_within_rule(losses, naive[0], golden[0], "losses")
        assert_within_rule(dlogits, naive[1], golden[1], "dlogits")
        assert not dlogits[1].any()
        results.append((losses, dlogits))
    for losses, dlogits in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(dlogits, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 37, 256, 1025, 4103])
@pytest.mark.parametrize("name", loss_cases.OPTIONS)
def test_class_weights_and_z_loss(
    emulated_extension: EmulatedExtension, name: str, classes: int, dtype: torch.dtype
) -> None:
    call, upstream = loss_cases.inputs(dtype, 4, classes, loss_cases.OPTIONS[name])
    spec = SoftmaxSpec.of(call.logits)
    losses, norms = backend.cross_entropy_fwd(spec, call)
    dlogits = backend.cross_entropy_bwd(spec, call, upstream, norms)
    loss_cases.assert_as_torchs(call, upstream, losses, dlogits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.double(), "class_weight: got Double, needs Float"),
        (lambda w: w[:-1], "class_weight: got shape"),
        (lambda w: torch.stack([w, w], 1)[:, 0], "class_weight: needs to be contiguous"),
        (lambda w: w.to("meta"), "class_weight: got device meta"),
    ],
)
def test_class_weights_that_do_not_fit(
    emulated_extension: EmulatedExtension, change: Callable[[Tensor], Tensor], message: str
) -> None:
    call, _ = loss_cases.inputs(torch.float32, 4, 9, {"weighted": True})
    assert call.class_weight is not None
    with pytest.raises((ValueError, TypeError), match=message):
        backend.cross_entropy_fwd(
            SoftmaxSpec.of(call.logits), replace(call, class_weight=change(call.class_weight))
        )


def test_a_vocabulary(emulated_extension: EmulatedExtension) -> None:
    arguments = inputs(torch.bfloat16, 3, 50257)
    golden = plain(arguments[0].double(), arguments[1], arguments[2].double(), 0.1)
    for actual, naive, expected in zip(run(*arguments, 0.1), plain(*arguments, 0.1), golden):
        assert_within_rule(actual, naive, expected)


def test_rows_that_begin_anywhere_and_a_gradient_in_their_place(
    emulated_extension: EmulatedExtension,
) -> None:
    for dtype in DTYPES:
        for offset in range(9):
            logits, target, upstream = inputs(dtype, 3, 701)
            logits[1] = 0
            storage = torch.full((offset + 3 * 710,), float("nan"), dtype=dtype)
            placed = storage[offset:].view(3, 710)[:, :701].copy_(logits)
            losses, dlogits = run(placed, target, upstream, 0.1)
            expected = run(logits, target, upstream, 0.1)
            torch.testing.assert_close(losses, expected[0])
            torch.testing.assert_close(dlogits, expected[1])
            call, spec = CrossEntropyCall(placed, target, -100, 0.1), SoftmaxSpec.of(placed)
            _, norms = backend.cross_entropy_fwd(spec, call)
            in_place = backend.cross_entropy_bwd(spec, call, upstream, norms, placed)
            assert in_place.data_ptr() == placed.data_ptr()
            assert torch.equal(in_place, dlogits)
            assert storage[offset:].view(3, 710)[:, 701:].isnan().all()


@pytest.mark.parametrize("options", [{}, *loss_cases.OPTIONS.values()], ids=["plain", *loss_cases.OPTIONS])
def test_a_target_that_is_no_class(emulated_extension: EmulatedExtension, options: dict[str, Any]) -> None:
    call, _ = loss_cases.inputs(torch.float32, 3, 11, options)
    call = replace(call, logits=torch.randn(3, 11), target=torch.tensor([3, 11, -1]))
    spec = SoftmaxSpec.of(call.logits)
    losses, norms = backend.cross_entropy_fwd(spec, call)
    dlogits = backend.cross_entropy_bwd(spec, call, torch.ones(3), norms)
    assert losses.isnan().tolist() == [False, True, True]
    assert dlogits.isnan().all(1).tolist() == [False, True, True]
    assert not dlogits[0].isnan().any()


def test_backends_cross(emulated_extension: EmulatedExtension) -> None:
    """Both give the same residuals: a forward of one serves the backward of the other."""
    logits, target, upstream = inputs(torch.float32, 5, 33)
    call, spec = CrossEntropyCall(logits, target, -100, 0.1), SoftmaxSpec.of(logits)
    for one, two in ((backend, other), (other, backend)):
        _, norms = one.cross_entropy_fwd(spec, call)
        norms[1] = 0  # an ignored row's are never used
        torch.testing.assert_close(
            two.cross_entropy_bwd(spec, call, upstream, norms),
            one.cross_entropy_bwd(spec, call, upstream, norms),
        )


def test_under_a_linear_layer(emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(9, 16), torch.randn(40, 16)
    target = torch.randint(0, 40, (9,))
    class_weight = torch.rand(40)
    call = LinearCrossEntropyCall(hidden, weight, None, target, -100, 0.0, 0.0, class_weight)
    spec = SoftmaxSpec.of(hidden @ weight.T)
    losses, norms, _ = backend.linear_cross_entropy_fwd(spec, call)
    torch.testing.assert_close(
        losses, F.cross_entropy(hidden @ weight.T, target, class_weight, reduction="none")
    )
    expected = chunked.backward(
        spec, call, torch.ones(9), norms, (True, True, False), other.cross_entropy_bwd
    )
    actual = backend.linear_cross_entropy_bwd(spec, call, torch.ones(9), norms, (True, True, False))
    for a, e in zip(actual, expected):
        if e is not None:
            torch.testing.assert_close(a, e)


def test_host_code_refuses(emulated_extension: EmulatedExtension) -> None:
    forward = emulated_extension.module.cross_entropy_forward
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for arguments, message in (
        ((logits[0], target), "logits: got shape"),
        ((logits.T.contiguous().T, target), "needs adjacent classes"),
        ((logits, target.int()), "target: got Int, needs Long"),
        ((logits, target[:1]), "target: got shape"),
        ((logits.double(), target), "logits: got Double, needs float16"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            forward(*arguments)
