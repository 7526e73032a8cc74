"""On a GPU, replays launch compiled kernels directly and give the bits of calls without plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import torch_compat
from fastattn.ops import plan

pytestmark = pytest.mark.gpu
HALF = torch.float16


def made(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device="cuda", dtype=HALF) for shape in shapes]


def offsets() -> Tensor:
    return torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")


def decode(query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    lengths = torch.tensor([700, 30], dtype=torch.int32, device="cuda")
    caches = (k_cache.clone(), v_cache.clone())
    with torch.no_grad():
        out = fastattn.attention_kv_cache(query, *caches, lengths, key=key, value=value)
    return out, *caches


HEADS = ((2, 4, 200, 64), (2, 2, 200, 64), (2, 2, 200, 64))
TOKENS = ((300, 4, 64), (300, 2, 64), (300, 2, 64))
CACHE = ((2, 4, 1, 64), (2, 2, 1024, 64), (2, 2, 1024, 64), (2, 2, 1, 64), (2, 2, 1, 64))
CASES: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Any]]] = {
    "attention": (HEADS, lambda *t: fastattn.attention(*t, causal=True, return_lse=True)),
    "attention, mask": (HEADS, lambda *t: fastattn.attention(*t, mask=torch.ones(200, 200, device="cuda") > 0)),
    "attention, slopes": (HEADS, lambda *t: fastattn.attention(*t, alibi_slopes=torch.ones(4, device="cuda"))),
    "varlen": (TOKENS, lambda *t: fastattn.attention_varlen(*t, offsets(), offsets(), 200, 200, causal=True)),
    "kv_cache": (CACHE, decode),
    "softmax": (((64, 1000),), lambda x: fastattn.softmax(x)),
    "cross_entropy": (((64, 1000),), lambda x: fastattn.cross_entropy(x, torch.arange(64, device="cuda"))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bits_and_launches_of_replays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.arguments import Launch

    shapes, call = CASES[name]
    started: list[str] = []
    start = Launch.start
    monkeypatch.setattr(
        Launch, "start", lambda launch: (started.append(launch.kernel.arg_names[0]), start(launch))[1]
    )

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        leaves = [t.requires_grad_(call is not decode) for t in made(*shapes)]
        results = call(*leaves)
        results = list(results) if isinstance(results, tuple) else [results]
        if call is decode:
            return results
        return [*results, *torch.autograd.grad(results, leaves, [torch.randn_like(r) for r in results])]

    monkeypatch.setenv("FASTATTN_DISABLE", "plan")
    expected = [run(seed) for seed in (1, 2)]
    monkeypatch.delenv("FASTATTN_DISABLE")
    for seed in (1, 1, 1, 2, 1):
        started.clear()
        for found, alone in zip(run(seed), expected[seed - 1], strict=True):
            assert torch.equal(found, alone)
    assert not started  # the last ones went to compiled kernels
    assert plan.count() == 1


def test_replays_run_on_the_stream_that_is_current() -> None:
    query, key, value = made(*HEADS)
    out = [fastattn.attention(query, key, value) for _ in range(4)][-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch_compat.cuda_sleep(10_000_000)
        query.mul_(2)  # after the wait, so that a launch elsewhere would see other numbers
        there = fastattn.attention(query, key, value)
    stream.synchronize()
    assert torch.equal(there, fastattn.attention(query, key, value))
    assert not torch.equal(there, out)


def test_replays_can_be_captured_in_a_graph() -> None:
    leaves = [t.requires_grad_() for t in made(*HEADS)]

    def step() -> tuple[Tensor, ...]:
        out = fastattn.attention(*leaves, causal=True)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for found, alone in zip(captured, step()):
        assert torch.equal(found, alone)
