"""`attention`: properties that hold on any backend, weights, dropout and dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_inputs import qkv
from contract import CASES, Case, Inputs
from torch import Tensor

import fastattn


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "blockwise"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_beyond_the_lengths_matters(softcap: float | None, poison: float) -> None:
    q, k, v = qkv(sk=40)
    lengths = torch.tensor([0, 23])

    def run(fill: float) -> list[Tensor]:
        k2, v2 = k.clone(), v.clone()
        for b, n in enumerate(lengths.tolist()):
            k2[b, :, n:], v2[b, :, n:] = fill, fill
        leaves = [t.requires_grad_() for t in (q.clone(), k2, v2)]
        out, lse, weights = fastattn.attention(
            *leaves, key_lengths=lengths, softcap=softcap, return_lse=True, return_weights=True
        )
        return [
            out,
            lse,
            weights,
            *torch.autograd.grad(out.sum() + lse[1].sum() + weights.square().sum(), leaves),
        ]

    for clean, poisoned in zip(run(0.0), run(poison)):
        assert torch.equal(clean, poisoned)
    dk, dv = run(poison)[4:]
    assert not dk[0].any()
    assert not dv[0].any()
    assert not dk[1, :, 23:].any()
    assert not dv[1, :, 23:].any()


def test_rows_that_see_nothing_ignore_their_lse_gradient() -> None:
    q, k, v = qkv(grad=True)
    mask = torch.ones(9, 11, dtype=torch.bool)
    mask[4] = False
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
    assert not out[:, :, 4].any()
    assert bool((lse[:, :, 4] == -math.inf).all())
    dlse = torch.ones_like(lse)
    dlse[:, :, 4] = math.nan
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
    assert all(not g.isnan().any() for g in grads)
    assert not grads[0][:, :, 4].any()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["fused", "blockwise"])
def test_a_bias_alone_may_require_a_gradient(options: dict[str, Any]) -> None:
    q, k, v = qkv(grad=True)
    bias = torch.randn(1, 4, 9, 11, requires_grad=True)
    together = torch.autograd.grad(
        fastattn.attention(q, k, v, bias=bias, **options).square().sum(), (q, k, v, bias)
    )
    detached = (q.detach(), k.detach(), v.detach())
    out = fastattn.attention(*detached, bias=bias, **options)
    (alone,) = torch.autograd.grad(out.square().sum(), bias)
    assert torch.equal(alone, together[-1])
    assert alone.any()


def test_a_sink_alone_gives_zero_out_and_its_own_lse() -> None:
    q, k, v = qkv()
    sinks = torch.randn(4)
    out, lse = fastattn.attention(
        q, k, v, sinks=sinks, mask=torch.zeros(9, 11, dtype=torch.bool), return_lse=True
    )
    assert not out.any()
    torch.testing.assert_close(lse, sinks[:, None].expand(2, 4, 9))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["fused", "blockwise"])
def test_lse_merges_partial_results(options: dict[str, Any]) -> None:
    """softmax over all keys = the parts over disjoint keys, weighted by exp(lse - total): what ring attention needs."""
    q, k, v = qkv(sk=64, dtype=torch.float64)
    whole, total = fastattn.attention(q, k, v, **options, return_lse=True)
    parts = [
        fastattn.attention(q, k[:, :, s], v[:, :, s], **options, return_lse=True)
        for s in (slice(0, 20), slice(20, 64))
    ]
    lses = torch.stack([lse for _, lse in parts])
    torch.testing.assert_close(torch.logsumexp(lses, 0), total)
    torch.testing.assert_close(sum(out * torch.exp(lse - total)[..., None] for out, lse in parts), whole)


def test_order_of_keys_does_not_matter() -> None:
    q, k, v = qkv(sk=300, dtype=torch.float64)
    order = torch.randperm(300)
    torch.testing.assert_close(
        fastattn.attention(q, k[:, :, order], v[:, :, order]), fastattn.attention(q, k, v)
    )


@pytest.mark.parametrize(
    "name", ["plain", "causal", "window both sides", "mask of rank 2", "softcap", "grouped heads"]
)
def test_a_batch_changes_nothing_bitwise(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = Inputs.of(case, torch.float32)
    q, k, v = (t.requires_grad_() for t in inputs.operands.values())
    both = fastattn.attention(q, k, v, **inputs.options)
    dout = torch.randn_like(both)
    grads = torch.autograd.grad(both, (q, k, v), dout)
    for b in range(2):
        leaves = [t[b : b + 1].detach().requires_grad_() for t in (q, k, v)]
        one = fastattn.attention(*leaves, **inputs.options)
        assert torch.equal(one, both[b : b + 1])
        for single, batched in zip(torch.autograd.grad(one, leaves, dout[b : b + 1]), grads):
            assert torch.equal(single, batched[b : b + 1])


@pytest.mark.parametrize("options", [{"causal": True}, {"sinks": torch.tensor([0.5, -1.0, 2.0])}], ids=str)
def test_a_batch_changes_nothing_bitwise_whatever_the_number_of_rows(options: dict[str, Tensor]) -> None:
    """Vectors of a processor end elsewhere in a batch than in one of its sequences."""
    for seqlen_q in range(1, 40, 3):
        q, k, v = torch.randn(3, 3, seqlen_q, 16), *torch.randn(2, 3, 3, seqlen_q + 40, 16).unbind()
        both = fastattn.attention(q, k, v, **options, return_lse=True)
        for b in range(3):
            one = fastattn.attention(*(t[b : b + 1] for t in (q, k, v)), **options, return_lse=True)
            for single, batched in zip(one, both):
                assert torch.equal(single, batched[b : b + 1])


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_bitwise_deterministic(case: Case) -> None:
    inputs = Inputs.of(case, torch.float32)
    first, second = (inputs.run(fastattn.attention, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "blockwise"])
def test_results_lie_in_memory_like_their_tensors(order: tuple[int, ...], softcap: float | None) -> None:
    sizes = (2, 4, 9, 8)
    back = [order.index(dim) for dim in range(4)]

    def permuted() -> Tensor:
        return torch.randn([sizes[dim] for dim in order]).permute(back).requires_grad_()

    q, k, v = permuted(), permuted(), permuted()
    out, lse = fastattn.attention(q, k, v, softcap=softcap, return_lse=True)
    assert out.stride() == q.stride()
    assert lse.is_contiguous()
    for leaf, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
        assert grad.stride() == leaf.stride()
    expected = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), softcap=softcap)
    torch.testing.assert_close(out, expected)


def test_views_of_packed_projections() -> None:
    """Slices of one (B, S, 3, H, D) tensor, as GPT-2 makes them, need no copy and give the same."""
    packed = torch.randn(2, 9, 3, 4, 8)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    expected = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    torch.testing.assert_close(fastattn.attention(q, k, v, causal=True), expected)


def test_expanded_heads() -> None:
    q, k, v = qkv(dtype=torch.float64)
    expanded = k[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(
        fastattn.attention(q, expanded, v), fastattn.reference.attention(q, expanded, v)
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["fused", "blockwise"])
def test_a_last_stride_other_than_one(options: dict[str, Any]) -> None:
    leaves = [torch.randn(2, 4, 8, 9, dtype=torch.float64).mT.requires_grad_() for _ in range(3)]
    dout = torch.randn(2, 4, 8, 9, dtype=torch.float64).mT
    results = []
    for attend in (fastattn.attention, fastattn.reference.attention):
        out = attend(*leaves, causal=True, **options)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch], ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["per head", "mean"])
def test_weights_and_their_gradient(case: Case, mean: bool) -> None:
    inputs = Inputs.of(case, torch.float64)
    kind = "mean" if mean else True
    results = []
    for attend in (fastattn.attention, fastattn.reference.attention):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.operands.items()}
        options = dict(inputs.options)
        for name in ("bias", "alibi_slopes"):
            if name in options:
                options[name] = leaves[name] = options[name].double().requires_grad_()
        out, lse, weights = attend(
            leaves["query"], leaves["key"], leaves["value"], **options, return_lse=True, return_weights=kind
        )
        torch.manual_seed(5)
        loss = (out * torch.randn(out.shape)).sum() + (weights * torch.randn(weights.shape)).sum()
        loss = loss + lse.masked_fill(lse == -math.inf, 0).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results.append((weights, *grads))
    for actual, expected in zip(*results):
        if actual is None or expected is None:
            assert all(g is None or not g.any() for g in (actual, expected))
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_weights_multiply_the_values() -> None:
    q, k, v = qkv(dtype=torch.float64)
    out, weights = fastattn.attention(
        q, k, v, causal=True, dropout_p=0.4, dropout_seed=3, return_weights=True
    )
    torch.testing.assert_close(weights @ v, out)
    _, mean = fastattn.attention(q, k, v, causal=True, dropout_p=0.4, dropout_seed=3, return_weights="mean")
    torch.testing.assert_close(mean, weights.mean(1))


def test_dropout_seeds() -> None:
    q, k, v = qkv()

    def run(seed: int | Tensor | None) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)

    assert torch.equal(run(5), run(torch.tensor([5])))
    assert torch.equal(run(5), run(torch.tensor(5)))
    assert torch.equal(run(2**64 - 1), run(-1))
    assert not torch.equal(run(5), run(6))
    torch.manual_seed(1)
    first, second = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(run(None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = qkv(grad=True)
    with torch.autocast("cpu", dtype):
        out = fastattn.attention(q, k, v.to(torch.float16))
    assert out.dtype == dtype
    torch.testing.assert_close(out, fastattn.attention(q.to(dtype), k.to(dtype), v.half().to(dtype)))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "blockwise"])
def test_autocast_stops_at_the_op(softcap: float | None) -> None:
    """What is kept in float32 outside autocast is kept in float32 inside it, forward, backward and transformed."""
    q, k, v = qkv(sq=40, sk=300, dtype=torch.bfloat16, grad=True)

    def run() -> list[Tensor]:
        out, lse, weights = fastattn.attention(q, k, v, softcap=softcap, return_lse=True, return_weights=True)
        results = [out, lse, weights, *torch.autograd.grad(out.sum() + lse.sum() + weights.sum(), (q, k, v))]
        return [*results, torch.func.vmap(lambda q: fastattn.attention(q, k, v, return_lse=True)[1])(q[None])]

    outside = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    for a, b in zip(inside, outside):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = qkv(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(q, k, v).dtype == torch.float64


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_of_another_dtype_keeps_it(bias_dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    bias = torch.randn(4, 9, 11, dtype=bias_dtype, requires_grad=True)
    out = fastattn.attention(q, k, v, bias=bias)
    (dbias,) = torch.autograd.grad(out.sum(), bias)
    assert (dbias.dtype, dbias.shape) == (bias_dtype, bias.shape)
