"""On a GPU: the extension's softmax and cross-entropy against float64, and the same bits a thousand times."""

from __future__ import annotations

import pytest
import torch
from softmax_cases import CASES, DTYPES, inputs, reference

import fastattn
from fastattn import extension
from fastattn.backends import switched_off
from numerics import assert_within_rule

pytestmark = pytest.mark.gpu

COLUMNS = [1, 8, 9, 256, 257, 1024, 8192, 8193, 16385, 32768, 32769, 65537, 131072, 131073, 262144, 262145]


@pytest.fixture(autouse=True)
def _built() -> None:
    if extension.state().module is None:
        pytest.skip(str(extension.state().reason))
    for part in ("softmax_fwd", "softmax_bwd", "cross_entropy_fwd", "cross_entropy_bwd"):
        if (reason := switched_off("cuda", part)) is not None:
            pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(name: str, dtype: torch.dtype) -> None:
    x, dout, dim, options = inputs(name, dtype, "cuda")
    out = fastattn.softmax(x.requires_grad_(), dim, backend="cuda", **options)
    actual = out, torch.autograd.grad(out, x, dout)[0]
    x = x.detach()
    plain = reference(x, dout, dim, **options)
    golden = reference(x.double(), dout.double(), dim, **options)
    for result, *three in zip(("out", "dx"), actual, plain, golden):
        assert_within_rule(*three, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_both_sides_of_thresholds(columns: int, dtype: torch.dtype) -> None:
    x, dout = (torch.randn(37, columns, device="cuda").to(dtype) for _ in range(2))
    leaf = x.requires_grad_()
    out = fastattn.softmax(leaf, backend="cuda")
    actual = out, torch.autograd.grad(out, leaf, dout)[0]
    plain = reference(x.detach(), dout, -1)
    golden = reference(x.detach().double(), dout.double(), -1)
    for result, *three in zip(("out", "dx"), actual, plain, golden):
        assert_within_rule(*three, result)


@pytest.mark.parametrize("columns", [200, 5000, 100_000, 300_000])
def test_the_same_bits_every_time(columns: int) -> None:
    x = torch.randn(64, columns, device="cuda", dtype=torch.bfloat16)
    first = fastattn.softmax(x, backend="cuda")
    differs = torch.zeros((), device="cuda", dtype=torch.bool)
    for _ in range(1000):
        differs |= (fastattn.softmax(x, backend="cuda") != first).any()
    assert not differs.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 1025, 50257])
def test_cross_entropy(classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    logits = (4 * torch.randn(33, classes, device="cuda")).to(dtype)
    target = torch.randint(0, classes, (33,), device="cuda")
    target[1] = -100

    def both(call, leaf):
        losses = call(leaf, target, label_smoothing=0.1, reduction="none")
        return losses, torch.autograd.grad(losses.sum(), leaf)[0]

    actual = both(fastattn.cross_entropy, logits.requires_grad_())
    plain = both(torch.nn.functional.cross_entropy, logits.detach().requires_grad_())
    golden = both(torch.nn.functional.cross_entropy, logits.detach().double().requires_grad_())
    for name, *three in zip(("losses", "dlogits"), actual, plain, golden):
        assert_within_rule(*three, name)


def test_the_current_stream_and_a_graph() -> None:
    x = torch.randn(8, 3000, device="cuda")
    out = fastattn.softmax(x, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fastattn.softmax(x, backend="cuda")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert not torch.equal(captured, out)
    torch.testing.assert_close(captured, x.softmax(-1))
