"""The extension's attention from tensors to gradients: its host code as built, its launches emulated."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cuda_emulation.extension import EmulatedExtension
from torch import Tensor

from fastattn import reference
from fastattn.backends import cuda, layout
from fastattn.backends.cuda import attention as cuda_attention
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded, VarlenCall
from numerics import assert_within_rule

DTYPE = torch.float16
MULTIPROCESSORS = 4  # of the stand-in device: stubs/runtime.cpp


def heads(batch: int, rows: int, num_heads: int, head_dim: int = 64) -> Tensor:
    """(B, H, S, D), each head a slice of wider rows in the memory order (B, S, H, D)."""
    return torch.randn(batch, rows, num_heads, 72).to(DTYPE)[..., :head_dim].transpose(1, 2)


def graded(
    inputs: tuple[Tensor, ...], dout: Tensor, dlse: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, **options, return_lse=True)
    grads = torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))
    return (out.detach(), lse.detach(), *grads)


@pytest.mark.parametrize("scale", [0.2, -0.2, 0.0])
@pytest.mark.parametrize(
    ("call_options", "options"),
    [
        ({}, {}),
        ({"causal": "bottom_right", "softcap": 2.0}, {"causal": True, "softcap": 2.0}),
        ({"causal": "top_left"}, {"causal": "top_left"}),
        ({"window_left": 20, "window_right": 9}, {"window": (20, 9)}),
    ],
    ids=["plain", "causal and softcap", "top left", "window"],
)
def test_dense(
    emulated_extension: EmulatedExtension, scale: float, call_options: dict[str, Any], options: dict[str, Any]
) -> None:
    query, dout = heads(2, 70, 2, 40), heads(2, 70, 2, 40)
    key, value = heads(2, 90, 1, 40), heads(2, 90, 1, 40)
    dlse = torch.randn(2, 2, 70)
    call = AttentionCall(query, key, value, scale=scale, **call_options)
    spec = AttentionSpec.of(call)
    out, lse = cuda_attention.attention_fwd(spec, call)
    assert out.stride() == torch.empty(2, 70, 2, 40).transpose(1, 2).stride()
    needs = GradsNeeded()
    grads = cuda_attention.attention_bwd(spec, call, out, lse, dout, dlse, needs)
    inputs = (query, key, value)
    golden = graded(tuple(x.double() for x in inputs), dout, dlse, {**options, "scale": scale})
    plain = graded(inputs, dout, dlse, {**options, "scale": scale})
    for name, actual, same, exact in zip(
        ("out", "lse", "dq", "dk", "dv"), (out, lse, *grads[:3]), plain, golden
    ):
        if exact.count_nonzero() == 0:
            assert actual.eq(0).all(), name
        else:
            assert_within_rule(actual, same, exact, name)


@pytest.mark.parametrize(
    "needs",
    [GradsNeeded(True, False, False), GradsNeeded(False, True, False), GradsNeeded(False, False, True)],
    ids=["query", "key", "value"],
)
def test_only_what_is_needed(emulated_extension: EmulatedExtension, needs: GradsNeeded) -> None:
    query, key, value, dout = (heads(1, 65, 1) for _ in range(4))
    lengths = torch.tensor([40], dtype=torch.int32)
    call = AttentionCall(query, key, value, key_lengths=lengths, scale=0.125)
    spec = AttentionSpec.of(call)
    out, lse = cuda_attention.attention_fwd(spec, call)
    expanded = dout[:, :, :1].expand_as(out)  # as from a sum: its rows have no strides
    spec, *residuals = layout.upstream(cuda, spec, out, lse, expanded, None)
    every = cuda_attention.attention_bwd(spec, call, *residuals, GradsNeeded())
    some = cuda_attention.attention_bwd(spec, call, *residuals, needs)
    for needed, one, all_of_them in zip(needs[:3], some[:3], every[:3]):
        assert (one is not None) == needed
        if needed:
            torch.testing.assert_close(one, all_of_them, rtol=0, atol=0)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_one_pass_where_it_was_measured_to_be_faster(
    emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    query, dout = (torch.randn(1, 2, 70, head_dim).to(DTYPE) for _ in range(2))
    key, value = (torch.randn(1, 1, 300, head_dim).to(DTYPE) for _ in range(2))
    dlse = torch.randn(1, 2, 70)
    call = AttentionCall(query, key, value, causal="bottom_right", scale=0.2)
    spec = AttentionSpec.of(call)
    out, lse = cuda_attention.attention_fwd(spec, call)
    two_passes = cuda_attention.attention_bwd(spec, call, out, lse, dout, dlse, GradsNeeded())
    monkeypatch.setattr(cuda_attention, "ONE_PASS_HEAD_DIMS", frozenset({head_dim}))
    one_pass = cuda_attention.attention_bwd(spec, call, out, lse, dout, dlse, GradsNeeded())
    inputs, options = (query, key, value), {"causal": True, "scale": 0.2}
    golden = graded(tuple(x.double() for x in inputs), dout, dlse, options)[2:]
    plain = graded(inputs, dout, dlse, options)[2:]
    for name, actual, same, exact in zip(("dq", "dk", "dv"), one_pass, plain, golden):
        assert_within_rule(actual, same, exact, name)
    assert not torch.equal(one_pass.query, two_passes.query)  # summed in another order


def test_clusters_change_no_bit(
    emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles in pairs run in clusters, unless clusters are switched off."""
    query, key, value = heads(1, 200, 2, 72), heads(1, 190, 1, 72), heads(1, 190, 1, 72)
    call = AttentionCall(query, key, value, scale=0.2)
    spec = AttentionSpec.of(call)
    assert "clusters of 2" in cuda_attention.attention_tiles(spec)
    out, lse = cuda_attention.attention_fwd(spec, call)
    assert emulated_extension.last_forward_cluster() == 2
    golden, plain = (
        reference.attention(*(x.to(dtype) for x in (query, key, value)), scale=0.2)
        for dtype in (torch.float64, DTYPE)
    )
    assert_within_rule(out, plain, golden, "out")
    monkeypatch.setenv("FASTATTN_DISABLE", "cuda.clusters")
    assert "clusters" not in cuda_attention.attention_tiles(spec)
    alone, alone_lse = cuda_attention.attention_fwd(spec, call)
    assert emulated_extension.last_forward_cluster() == 1
    assert torch.equal(alone, out)
    assert torch.equal(alone_lse, lse)


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": "bottom_right"},
        {"window_left": 90},
        {"window_right": 90},
        {"softcap": 2.0},
        {"key_lengths": torch.tensor([100], dtype=torch.int32)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_only_full_calls_run_in_clusters(
    emulated_extension: EmulatedExtension, changes: dict[str, Any]
) -> None:
    """In other calls the blocks of a cluster see different keys."""
    query, key = heads(1, 200, 1, 72), heads(1, 190, 1, 72)
    call = AttentionCall(query, key, key, scale=0.2, **changes)
    spec = AttentionSpec.of(call)
    assert "clusters" not in cuda_attention.attention_tiles(spec)
    cuda_attention.attention_fwd(spec, call)
    assert emulated_extension.last_forward_cluster() == 1


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, False),
        ({"softcap": 2.0}, False),
        ({"causal": "bottom_right"}, True),
        ({"causal": "top_left"}, True),
        ({"window_left": 3}, True),
        ({"window_right": 3}, True),
        ({"key_lengths": torch.tensor([3], dtype=torch.int32)}, True),
    ],
    ids=["full", "softcap", "causal", "top left", "window left", "window right", "key lengths"],
)
def test_tiles_of_uneven_length_come_from_a_counter(
    emulated_extension: EmulatedExtension, changes: dict[str, Any], counted: bool
) -> None:
    """Where blocks take several: more tiles than the stand-in device has multiprocessors."""
    for tiles in (MULTIPROCESSORS, MULTIPROCESSORS + 1):
        query, key = heads(1, 1, tiles), heads(1, 5, tiles)
        call = AttentionCall(query, key, key, scale=0.2, **changes)
        cuda_attention.attention_fwd(AttentionSpec.of(call), call)
        assert emulated_extension.last_forward_counted() == (counted and tiles > MULTIPROCESSORS)


def test_packed_tiles_come_from_a_counter(emulated_extension: EmulatedExtension) -> None:
    """Also without a mask: the sequences differ in length."""
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32)
    for tiles in (MULTIPROCESSORS, MULTIPROCESSORS + 1):
        query = torch.randn(4, tiles, 64).to(DTYPE)
        call = VarlenCall(query, query, query, cu_seqlens, cu_seqlens, causal="none", scale=0.125)
        cuda_attention.varlen_fwd(AttentionSpec.of(call.as_one_sequence()), call)
        assert emulated_extension.last_forward_counted() == (tiles > MULTIPROCESSORS)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_tile_needs_no_cluster(emulated_extension: EmulatedExtension, head_dim: int) -> None:
    query, key = (torch.randn(1, 1, 70, head_dim).to(DTYPE) for _ in range(2))
    call = AttentionCall(query, key, key, scale=0.2)
    cuda_attention.attention_fwd(AttentionSpec.of(call), call)
    assert emulated_extension.last_forward_cluster() == 1


def test_packed_is_each_sequence(emulated_extension: EmulatedExtension) -> None:
    """Lengths below, at and past a tile; the packed call's bits are those of each sequence alone."""
    ends = [0, 5, 5, 133, 262]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    query, key, value, dout = (torch.randn(265, 2, 64).to(DTYPE) for _ in range(4))
    dlse = torch.randn(2, 265)
    call = VarlenCall(query, key, value, cu_seqlens, cu_seqlens, causal="bottom_right", scale=0.125)
    spec = AttentionSpec.of(call.as_one_sequence())
    out, lse = cuda_attention.varlen_fwd(spec, call)
    grads = cuda_attention.varlen_bwd(spec, call, out, lse, dout, dlse, GradsNeeded())
    assert out[ends[-1] :].eq(0).all()
    assert lse[:, ends[-1] :].isneginf().all()
    for grad in grads[:3]:
        assert grad[ends[-1] :].eq(0).all()
    for first, end in pairwise(ends):
        rows = slice(first, end)
        if first == end:
            continue
        own = (x[None, rows].transpose(1, 2) for x in (query, key, value))
        alone = AttentionCall(*own, causal="bottom_right", scale=0.125)
        own_out, own_lse = cuda_attention.attention_fwd(spec, alone)
        own_dout = dout[None, rows].transpose(1, 2)
        _, *residuals = layout.upstream(cuda, spec, own_out, own_lse, own_dout, dlse[None, :, rows])
        own_grads = cuda_attention.attention_bwd(spec, alone, *residuals, GradsNeeded())
        assert torch.equal(lse[:, rows], own_lse[0])
        for packed, single in zip((out, *grads[:3]), (own_out, *own_grads[:3])):
            assert torch.equal(packed[rows], single[0].transpose(0, 1))


@pytest.mark.parametrize(
    "shape", [(0, 2, 9, 64), (1, 2, 0, 64), (1, 0, 9, 64)], ids=["batch", "rows", "heads"]
)
def test_nothing_to_do(emulated_extension: EmulatedExtension, shape: tuple[int, ...]) -> None:
    query, key = torch.randn(shape).to(DTYPE), torch.randn(shape[0], shape[1], 7, 64).to(DTYPE)
    for q, k in ((query, key), (key, query)):
        call = AttentionCall(q, k, k, scale=1.0)
        spec = AttentionSpec.of(call)
        out, lse = cuda_attention.attention_fwd(spec, call)
        assert out.eq(0).all()
        assert lse.isneginf().all()
        grads = cuda_attention.attention_bwd(spec, call, out, lse, torch.randn_like(q), None, GradsNeeded())
        assert all(grad.eq(0).all() and grad.shape == x.shape for grad, x in zip(grads[:3], (q, k, k)))


ONE_PASS_NEEDS = "one_pass: needs a head dim of at most 128, no softcap and all gradients"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dout": torch.zeros(1, 1, 9, 64)}, "dout: got Float, needs float16 or bfloat16"),
        (
            {"dout": torch.zeros(1, 1, 8, 64, dtype=DTYPE)},
            r"dout: got shape \[1, 1, 8, 64\], needs \[1, 1, 9, 64\]",
        ),
        ({"out": torch.zeros(1, 1, 9, 64, dtype=torch.bfloat16)}, "out: got BFloat16, needs Half"),
        ({"lse": torch.zeros(1, 1, 9, dtype=torch.float64)}, "lse: got Double, needs Float"),
        ({"lse": torch.zeros(1, 9, 1)}, r"lse: got shape \[1, 9, 1\], needs \[1, 1, 9\]"),
        ({"dlse": torch.zeros(1, 1, 18)[..., ::2]}, "dlse: needs to be contiguous"),
        ({"scale": -1.0}, "scale: got -1, needs a positive number"),
        ({"window_left": -2}, "window_left: got -2, needs -1 or more"),
        ({"one_pass": True, "softcap": 2.0}, ONE_PASS_NEEDS),
        ({"one_pass": True, "key_grads": False}, ONE_PASS_NEEDS),
        ({"one_pass": True, "query_grad": False}, ONE_PASS_NEEDS),
        (
            {"one_pass": True}
            | dict.fromkeys(("dout", "query", "key", "value", "out"), torch.zeros(1, 1, 9, 136, dtype=DTYPE)),
            ONE_PASS_NEEDS,
        ),
    ],
)
def test_bad_arguments(emulated_extension: EmulatedExtension, changes: dict[str, Any], message: str) -> None:
    tensor = torch.zeros(1, 1, 9, 64, dtype=DTYPE)
    arguments = dict.fromkeys(("dout", "query", "key", "value", "out"), tensor)
    arguments |= {"lse": torch.zeros(1, 1, 9), "scale": 1.0, **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        emulated_extension.module.attention_backward(**arguments)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("name", "element", "value"),
    [
        ("query", (0, 1, 66, 3), float("nan")),
        ("query", (0, 1, 66), float("nan")),
        ("query", (0, 1, 66, 3), INFINITE),
        ("query", (0, 1, 66, 3), -INFINITE),
        ("key", (0, 0, 40, 3), float("nan")),
        ("key", (0, 0, 140, 3), INFINITE),
        ("key", (0, 0, 40, 3), -INFINITE),
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scores_that_are_not_finite(
    emulated_extension: EmulatedExtension, name: str, element: tuple[int, ...], value: float, softcap: float
) -> None:
    """Rows are NaN in out and lse where the formula's are, and no others; their gradients and those of what they see
    are NaN too."""
    query, dout = heads(1, 70, 2, 40), heads(1, 70, 2, 40)
    key, value_ = heads(1, 150, 1, 40), heads(1, 150, 1, 40)
    {"query": query, "key": key}[name][element] = value
    options = {"causal": True, "scale": 0.2, "softcap": softcap or None}
    call = AttentionCall(query, key, value_, causal="bottom_right", scale=0.2, softcap=softcap)
    spec = AttentionSpec.of(call)
    out, lse = cuda_attention.attention_fwd(spec, call)
    grads = cuda_attention.attention_bwd(spec, call, out, lse, dout, None, GradsNeeded())
    wanted = graded(tuple(x.float() for x in (query, key, value_)), dout, torch.zeros(1, 2, 70), options)
    assert torch.equal(out.isnan(), wanted[0].isnan())
    assert torch.equal(lse.isnan(), wanted[1].isnan())
    nan_rows = wanted[1].isnan()
    assert grads.query.isnan()[nan_rows].all()
    spoiled = grads.query.isnan() & ~wanted[2].isnan()
    if (
        name == "query" and softcap
    ):  # an infinite query times the zeros past the last key is NaN in the tanh's slope
        spoiled[:, 1, 66] = False
    assert not spoiled.any()
    if nan_rows.any():  # the last such row sees these keys
        seen = int(nan_rows.nonzero()[:, 2].max()) + 81
        assert all(grad[:, :, :seen].isnan().any(-1).all() for grad in grads[1:3])


def test_scores_of_minus_infinity_have_no_weight(emulated_extension: EmulatedExtension) -> None:
    """A row that has nothing else sees nothing; in another, whole tiles of them come before the first number."""
    query, key, value = heads(1, 70, 1), heads(1, 400, 1), heads(1, 400, 1)
    key[..., 0] = key[..., 0].abs() + 1
    query[:, :, 3], query[:, :, 3, 0] = 0, -INFINITE
    out, lse = cuda_attention.attention_fwd(AttentionSpec.of(call := AttentionCall(query, key, value)), call)
    assert not out[0, 0, 3].any()
    assert lse[0, 0, 3] == -INFINITE
    key[:, :, -300:, 0] = INFINITE
    call = AttentionCall(-query.abs().nan_to_num(posinf=1.0), key, value)
    out, lse = cuda_attention.attention_fwd(AttentionSpec.of(call), call)
    seen = (call.query, key[:, :, :100], value[:, :, :100])
    golden, plain = (
        reference.attention(*(x.to(dtype) for x in seen), scale=1.0, return_lse=True)
        for dtype in (torch.float64, DTYPE)
    )
    for name, actual, same, exact in zip(("out", "lse"), (out, lse), plain, golden):
        assert_within_rule(actual, same, exact, name)
