"""The Triton cross-entropy through the interpreter against float64, alone and under a linear layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from attention_cases import DEVICE
from torch import Tensor

from fastattn.backends import layout, triton
from fastattn.backends import linear_cross_entropy as chunked
from fastattn.backends.torch import cross_entropy as other
from fastattn.backends.triton import cross_entropy as backend
from fastattn.kernels import row_tiles
from fastattn.kernels.row_tiles import RowTile
from fastattn.ops.cross_entropy_registration import linear_spec
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec
from numerics import assert_within_rule, plain_in_any_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKED = RowTile(1, 16, 1, whole=False)


def inputs(dtype: torch.dtype, rows: int, classes: int, spread: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, target, upstream); one row is ignored and holds NaN."""
    logits = (spread * torch.randn(rows, classes, device=DEVICE)).to(dtype)
    target = torch.randint(0, classes, (rows,), device=DEVICE)
    target[1], logits[1] = -100, float("nan")
    return logits, target, torch.randn(rows, device=DEVICE)


def plain(logits: Tensor, target: Tensor, upstream: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    leaf = logits.masked_fill((target == -100)[:, None], 0).requires_grad_()
    losses = F.cross_entropy(leaf, target, label_smoothing=smoothing, reduction="none")
    return losses, torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))[0]


@pytest.mark.parametrize("tile", [None, CHUNKED], ids=["whole", "chunks"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [37, 64])
def test_error_rule(classes: int, dtype: torch.dtype, smoothing: float, tile: RowTile | None) -> None:
    logits, target, upstream = inputs(dtype, 6, classes)
    call, spec = CrossEntropyCall(logits, target, -100, smoothing), SoftmaxSpec.of(logits)
    losses, norms = backend.cross_entropy_fwd(spec, call, tile)
    dlogits = backend.cross_entropy_bwd(spec, call, upstream, norms, None, tile)
    golden = plain(logits.double(), target, upstream.double(), smoothing)
    naive = plain_in_any_order(partial(plain, logits, target, upstream, smoothing), golden)
    assert_within_rule(losses, naive[0], golden[0], "losses")
    assert_within_rule(dlogits, naive[1], golden[1], "dlogits")
    assert not dlogits[1].any()


@pytest.mark.parametrize("tile", [None, CHUNKED], ids=["whole", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", loss_cases.OPTIONS)
def test_class_weights_and_z_loss(name: str, dtype: torch.dtype, tile: RowTile | None) -> None:
    call, upstream = loss_cases.inputs(dtype, 6, 37, loss_cases.OPTIONS[name], DEVICE)
    spec = SoftmaxSpec.of(call.logits)
    losses, norms = backend.cross_entropy_fwd(spec, call, tile)
    dlogits = backend.cross_entropy_bwd(spec, call, upstream, norms, None, tile)
    loss_cases.assert_as_torchs(call, upstream, losses, dlogits)
    torch.testing.assert_close(other.cross_entropy_bwd(spec, call, upstream, norms), dlogits)


@pytest.mark.parametrize("classes", [1, 2, row_tiles.LOSS_CHUNK, row_tiles.LOSS_CHUNK + 1, 50257])
def test_vocabularies(classes: int) -> None:
    logits, target, upstream = inputs(torch.float32, 3, classes)
    call, spec = CrossEntropyCall(logits, target, -100, 0.1), SoftmaxSpec.of(logits)
    losses, norms = backend.cross_entropy_fwd(spec, call)
    expected = plain(logits.double(), target, upstream.double(), 0.1)
    naive = plain_in_any_order(partial(plain, logits, target, upstream, 0.1), expected)
    assert_within_rule(losses, naive[0], expected[0], "losses")
    actual = backend.cross_entropy_bwd(spec, call, upstream, norms)
    assert_within_rule(actual, naive[1], expected[1], "dlogits")


def test_backends_cross() -> None:
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


def test_gradient_in_place_of_the_logits_and_other_layouts() -> None:
    logits, target, upstream = inputs(torch.float32, 5, 33)
    logits[1] = 0
    call, spec = CrossEntropyCall(logits, target, -100, 0.0), SoftmaxSpec.of(logits)
    losses, norms = backend.cross_entropy_fwd(spec, call)
    expected = backend.cross_entropy_bwd(spec, call, upstream, norms)
    for strided in (logits.T.contiguous().T, torch.cat([logits, logits], 1)[:, :33]):
        spec_of_it, moved = SoftmaxSpec.of(strided), CrossEntropyCall(strided, target, -100, 0.0)
        moved = layout.for_backend(triton, moved)
        assert torch.equal(backend.cross_entropy_fwd(spec_of_it, moved)[0], losses)
        assert torch.equal(backend.cross_entropy_bwd(spec_of_it, moved, upstream, norms), expected)
    assert backend.cross_entropy_bwd(spec, call, upstream, norms, logits) is logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("options", [{}, *loss_cases.OPTIONS.values()], ids=["plain", *loss_cases.OPTIONS])
@pytest.mark.parametrize("wrong", [-1, 33, 2**40])
@pytest.mark.parametrize("module", [backend, other], ids=["triton", "torch"])
def test_a_target_that_is_no_class_is_never_silent(module: Any, wrong: int, options: dict[str, Any]) -> None:
    call, upstream = loss_cases.inputs(torch.float32, 5, 33, options, DEVICE)
    call.target[3], spec = wrong, SoftmaxSpec.of(call.logits)
    losses, norms = module.cross_entropy_fwd(spec, call)
    dlogits = module.cross_entropy_bwd(spec, call, upstream, norms)
    assert losses.isnan().tolist() == [False, False, False, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, False, False, True, False]
    assert dlogits.isnan().any(1).sum() == 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_under_a_linear_layer(softcap: float, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and gradients as the torch backend's, kept from the forward or made in the backward."""
    monkeypatch.setitem(chunked.CHUNK_LOGITS, DEVICE, 3 * 37)
    hidden, weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((11, 8), (37, 8), (37,)))
    target = torch.randint(0, 37, (11,), device=DEVICE)
    target[4] = -100
    extras = (torch.rand(37, device=DEVICE), 0.01) if weighted else (None, 0.0)
    call = LinearCrossEntropyCall(hidden, weight, bias, target, -100, 0.1, softcap, *extras)
    spec, needs = linear_spec(hidden, weight, backward=False), (True, True, True)
    losses, norms, kept = backend.linear_cross_entropy_fwd(spec, call, needs)
    expected, _, expected_grads = other.linear_cross_entropy_fwd(spec, call, needs)
    torch.testing.assert_close(losses, expected)
    again = backend.linear_cross_entropy_bwd(spec, call, torch.ones_like(losses), norms, needs)
    for a, b, e in zip(kept, again, expected_grads):
        torch.testing.assert_close(a, e)
        assert torch.equal(a, b)
