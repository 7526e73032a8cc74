"""Attention on a CUDA device against float64: every clause of the contract and larger grids, on each backend there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import CASES, Case, Inputs, check
from torch import Tensor

import fastattn
from fastattn import backends

pytestmark = pytest.mark.gpu

NAMES = [backend.NAME for backend in backends.BACKENDS]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _or_skip(run: Callable[[], Any]) -> Any:
    """The result, or a skip with the reason where the named backend does not have the call's features."""
    try:
        return run()
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))


def _normal(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = True) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, dtype: torch.dtype, backend: str) -> None:
    _or_skip(lambda: check(case, dtype, device="cuda", backend=backend))


GRID = [
    Case(
        f"{'causal' if causal else 'full'} S{length} D{dim}",
        (lambda make: {"causal": True}) if causal else (lambda make: {}),
        batch=1,
        kv_heads=2,
        seqlen_q=length,
        seqlen_k=length,
        head_dim=dim,
        value_dim=dim,
    )
    for length in (512, 777, 1024, 2113)
    for dim in (64, 128, 256)
    for causal in (True, False)
]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case, dtype: torch.dtype, backend: str) -> None:
    _or_skip(lambda: check(case, dtype, device="cuda", backend=backend))


@pytest.mark.parametrize("second", NAMES)
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("case", [GRID[0], GRID[7]], ids=str)
def test_crossed_backends_agree(case: Case, first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of one backend with the backward of another keeps to the error rule."""
    chosen = backends.select

    def select(spec: Any, name: str = "auto", op: str = "attention_fwd") -> Any:
        return chosen(spec, second if op == "attention_bwd" else first, op)

    monkeypatch.setattr(backends, "select", select)
    _or_skip(lambda: check(case, torch.float16, device="cuda"))


@pytest.mark.parametrize("backend", NAMES)
def test_a_call_is_a_cuda_graph(backend: str) -> None:
    """Forward and backward are captured, and a replay on new inputs equals an eager call bit by bit."""
    operands = [_normal(2, 4, 300, 64) for _ in range(3)]
    dout = _normal(2, 4, 300, 64, grad=False)

    def step() -> list[Tensor]:
        out = fastattn.attention(*operands, causal=True, backend=backend)
        return [out, *torch.autograd.grad(out, operands, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _or_skip(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (*operands, dout):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    replayed = [t.detach().clone() for t in captured]
    for actual, expected in zip(replayed, step(), strict=True):
        assert torch.equal(actual, expected)


def test_replays_of_a_graph_draw_fresh_dropout_masks() -> None:
    query = _normal(1, 2, 128, 64, grad=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fastattn.attention(query, query, query, dropout_p=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(query, query, query, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.parametrize("length", [192, 320])
def test_masked_backward_is_finite_where_cudnn_is_not(length: int) -> None:
    """Length 64 modulo 128 with an explicit mask and a row whose lse is far below -88.7."""
    operands = [_normal(1, 2, length, 64, dtype=torch.bfloat16) for _ in range(3)]
    bias = torch.zeros(1, 1, length, length, device="cuda")
    bias[:, :, ::2] -= 300
    out = fastattn.attention(*operands, bias=bias)
    for grad in torch.autograd.grad(out.float().sum(), operands):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", NAMES)
def test_every_run_gives_the_same_bits(backend: str) -> None:
    case = Case(
        "repeat",
        lambda make: {"causal": True},
        kv_heads=2,
        seqlen_q=1500,
        seqlen_k=1500,
        head_dim=64,
        value_dim=64,
    )
    inputs = Inputs.of(case, torch.float16, "cuda")
    first = _or_skip(lambda: inputs.run(fastattn.attention, torch.float16, backend=backend))
    for _ in range(20 if backend == "torch" else 1000):
        again = inputs.run(fastattn.attention, torch.float16, backend=backend)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_mixed_devices_are_refused() -> None:
    query = _normal(1, 1, 8, 16, grad=False)
    with pytest.raises((ValueError, TypeError), match="key"):
        fastattn.attention(query, query.cpu(), query.cpu())
