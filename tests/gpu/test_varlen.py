"""Packed sequences on a CUDA device against float64, captured in a graph, and loaded by TMA."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import backends
from fastattn.backends import triton as triton_backend
from fastattn.kernels.tiles import table_tiles
from fastattn.ops.varlen import call_arguments
from fastattn.spec import AttentionSpec, VarlenCall
from numerics import assert_within_rule

pytestmark = pytest.mark.gpu

NAMES = [backend.NAME for backend in backends.BACKENDS]
LENGTHS = [777, 0, 1, 2048, 130, 64, 513]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (200, 30)},
    "softcap and dropout": {"causal": True, "softcap": 20.0, "dropout_p": 0.1, "dropout_seed": 3},
}


def _edges(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def _tokens(number: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(number, heads, dim, device="cuda").to(dtype)


def _results(
    attend: Any, leaves: list[Tensor], cu_seqlens: Tensor, dout: Tensor, **options: Any
) -> list[Tensor]:
    out, lse = attend(*leaves, cu_seqlens, cu_seqlens, **options, return_lse=True)
    return [out, lse, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name: str, head_dim: int, dtype: torch.dtype, backend: str) -> None:
    cu_seqlens = _edges(LENGTHS)
    tensors = [_tokens(sum(LENGTHS) + 5, heads, head_dim, dtype) for heads in (4, 2, 2)]
    dout = _tokens(sum(LENGTHS) + 5, 4, head_dim, dtype)

    def run(attend: Any, precision: torch.dtype, **extra: Any) -> list[Tensor]:
        leaves = [t.to(precision).requires_grad_() for t in tensors]
        return _results(attend, leaves, cu_seqlens, dout, **OPTIONS[name], **extra)

    try:
        actual = run(fastattn.attention_varlen, dtype, max_seqlen_q=2048, max_seqlen_k=2048, backend=backend)
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))
    plain, golden = (run(fastattn.reference.attention_varlen, t) for t in (dtype, torch.float64))
    for result, *references in zip(("out", "lse", "dquery", "dkey", "dvalue"), actual, plain, golden):
        assert_within_rule(*references, f"{name}: {result}", dtype)


def test_a_graph_replays_with_other_lengths() -> None:
    """Grids depend on no length, so one graph serves every batch of as many tokens and sequences; and nothing waits."""
    tokens = sum(LENGTHS)
    leaves = [_tokens(tokens, 4, 64, torch.float16).requires_grad_() for _ in range(3)]
    dout, cu_seqlens = _tokens(tokens, 4, 64, torch.float16), _edges(LENGTHS)
    options = {"max_seqlen_q": tokens, "max_seqlen_k": tokens, "causal": True, "backend": "triton"}

    def step() -> list[Tensor]:
        return _results(fastattn.attention_varlen, leaves, cu_seqlens, dout, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in (LENGTHS[::-1], [tokens, *[0] * (len(LENGTHS) - 1)], [1] * len(LENGTHS)):
        cu_seqlens.copy_(_edges(lengths))
        graph.replay()
        replayed = [t.detach().clone() for t in captured]
        for actual, expected in zip(replayed, step(), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_operands_loaded_by_tma_give_the_same_bits(packed: bool, head_dim: int) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")
    query, key, value = (_tokens(sum(LENGTHS), heads, head_dim, torch.bfloat16) for heads in (4, 2, 2))
    cu_seqlens = _edges(LENGTHS if packed else [sum(LENGTHS)])
    defaults = {"causal": True, "window": None, "alibi_slopes": None, "softcap": None, "sinks": None, "scale": None,
                "dropout_p": 0.0, "dropout_seed": None}  # fmt: skip
    call = VarlenCall(*call_arguments(query, key, value, cu_seqlens, cu_seqlens, None, None, **defaults))
    spec = AttentionSpec.of(call.as_one_sequence())
    tiles = table_tiles(spec)
    without, with_tma = (replace(tiles, forward=replace(tiles.forward, tma=tma)) for tma in (False, True))
    run = triton_backend.varlen_fwd if packed else triton_backend.attention_fwd
    given = call if packed else call.as_one_sequence()
    for plain, tma in zip(run(spec, given, without), run(spec, given, with_tma), strict=True):
        assert torch.equal(plain, tma)
