"""`attention_varlen`: packed sequences against the reference and against the padded call."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fastattn
from fastattn.ops.varlen import call_arguments
from numerics import assert_within_rule, plain_in_any_order

# an empty sequence, and two tokens of no sequence
CU_SEQLENS_Q = torch.tensor([0, 3, 3, 70, 150], dtype=torch.int32)
CU_SEQLENS_K = torch.tensor([0, 40, 49, 49, 130], dtype=torch.int32)  # the third has queries but no keys
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (9, 4)},
    "window and causal": {"window": (9, None), "causal": True},
    "softcap": {"softcap": 2.0, "scale": 0.3},
    "slopes": {"alibi_slopes": (4,)},
    "slopes per sequence": {"alibi_slopes": (4, 4), "causal": True},
    "sinks": {"sinks": (4,)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 7},
    "everything": {"causal": True, "window": (30, None), "softcap": 2.0, "alibi_slopes": (4, 4), "sinks": (4,),
                   "dropout_p": 0.2, "dropout_seed": -3},
}  # fmt: skip


def packed(
    dtype: torch.dtype, *, tokens_q: int = 152, tokens_k: int = 131, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens_q, 4, 16), (tokens_k, 2, 16), (tokens_k, 2, 12))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def run(attend: Any, name: str, dtype: torch.dtype, seed: int = 0, **extra: Any) -> dict[str, Tensor]:
    """out, lse and every gradient in `dtype` from inputs that are the same for every dtype."""
    low = torch.bfloat16 if extra.pop("from_half", False) else torch.float32
    leaves = {n: t.to(dtype) for n, t in zip("qkv", packed(low, seed=seed))}
    options = dict(OPTIONS[name])
    torch.manual_seed(seed + 1)
    for option in ("alibi_slopes", "sinks"):
        if option in options:
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            leaves[option] = options[option] = torch.rand(options[option]).to(kept)
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, lse = attend(
        leaves["q"], leaves["k"], leaves["v"], CU_SEQLENS_Q, CU_SEQLENS_K, **options, **extra, return_lse=True
    )
    torch.manual_seed(seed + 2)
    upstream_grads = (torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape).to(lse.dtype))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), upstream_grads)
    return {"out": out, "lse": lse, **{"d" + n: g for n, g in zip(leaves, grads)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    half = {"from_half": dtype != torch.float32}
    for seed in range(4):
        actual = run(fastattn.attention_varlen, name, dtype, seed, backend="torch", **half)
        golden = run(fastattn.reference.attention_varlen, name, torch.float64, seed, **half)
        formula = partial(run, fastattn.reference.attention_varlen, name, dtype, seed, **half)
        plain = plain_in_any_order(formula, golden)
        for key in actual:
            assert_within_rule(actual[key], plain[key], golden[key], f"{name}, inputs {seed}: {key}", dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_float64_agrees_to_rounding(name: str) -> None:
    actual, golden = (
        run(attend, name, torch.float64)
        for attend in (fastattn.attention_varlen, fastattn.reference.attention_varlen)
    )
    for key, value in actual.items():
        torch.testing.assert_close(
            value, golden[key], rtol=1e-10, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_equals_the_padded_call() -> None:
    """One sequence at a time by `attention`, the sequence's place in the batch in the dropout stream included."""
    q, k, v = packed(torch.float64)
    out = fastattn.attention_varlen(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K, causal=True)
    for (start, stop), (first, last) in zip([(0, 3), (70, 150)], [(0, 40), (49, 130)]):
        one = fastattn.attention(
            q[start:stop].transpose(0, 1)[None], k[first:last].transpose(0, 1)[None],
            v[first:last].transpose(0, 1)[None], causal=True,
        )  # fmt: skip
        torch.testing.assert_close(one[0].transpose(0, 1), out[start:stop])
    cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32)
    options: dict[str, Any] = {"dropout_p": 0.4, "dropout_seed": 3}
    varlen = fastattn.attention_varlen(q[:40], k[:40], v[:40], cu_seqlens, cu_seqlens, **options)
    padded = fastattn.attention(
        *(t[:40].view(2, 20, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)), **options
    )
    torch.testing.assert_close(padded.transpose(1, 2).flatten(0, 1), varlen)


def test_what_belongs_to_no_sequence_or_sees_no_key() -> None:
    q, k, v = (t.requires_grad_() for t in packed(torch.float32))
    out, lse = fastattn.attention_varlen(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K, return_lse=True)
    for tokens in (slice(3, 70), slice(150, 152)):
        assert not out[tokens].any()
        assert bool((lse[:, tokens] == -math.inf).all())
    dq, dk, _ = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert not dq[3:70].any()
    assert not dk[40:49].any()
    assert not dk[130:].any()


def test_a_batch_changes_nothing_bitwise() -> None:
    q, k, v = packed(torch.float32)
    whole = fastattn.attention_varlen(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K, causal=True)
    cu_seqlens = (torch.tensor([0, 80], dtype=torch.int32), torch.tensor([0, 81], dtype=torch.int32))
    alone = fastattn.attention_varlen(q[70:150], k[49:130], v[49:130], *cu_seqlens, causal=True)
    assert torch.equal(alone, whole[70:150])


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0, 0]], ids=["no sequences", "empty sequences"])
def test_empty_batches(cu_seqlens: list[int]) -> None:
    q, k, v = packed(torch.float32, tokens_q=0, tokens_k=0)
    cu = torch.tensor(cu_seqlens, dtype=torch.int32)
    out, lse = fastattn.attention_varlen(q, k, v, cu, cu, return_lse=True)
    assert out.shape == (0, 4, 12)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_opcheck(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in packed(torch.float32))
    options = dict(OPTIONS[name])
    for option in ("alibi_slopes", "sinks"):
        if option in options:
            options[option] = torch.rand(options[option]).requires_grad_()
    args = call_arguments(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K, 100, 100, **{"alibi_slopes": None, **options})
    opcheck(torch.ops.fastattn.varlen_fwd.default, (*args, "auto"))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    out, lse = torch.ops.fastattn.varlen_fwd(*detached, "auto")
    needs = [True] * 3 + ["alibi_slopes" in options, "sinks" in options]
    opcheck(torch.ops.fastattn.varlen_bwd.default, (out, lse, out, lse, *detached, needs, "auto"))
    opcheck(torch.ops.fastattn.varlen_bwd.default, (out, None, out, lse, *detached, [False] * 5, "auto"))


def small() -> tuple[list[Tensor], Any]:
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    q = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(5, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    slopes, sinks = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, causal=True, alibi_slopes=slopes, sinks=sinks, softcap=2.0, dropout_p=0.3,
            dropout_seed=1, return_lse=True,
        )  # fmt: skip

    return [q, k, v, slopes, sinks], attend


def test_derivatives_by_finite_differences() -> None:
    leaves, attend = small()
    assert gradcheck(attend, leaves)
    with pytest.warns(RuntimeWarning, match="second derivative"):
        assert gradgradcheck(attend, leaves)


def test_jvp_matches_the_reference() -> None:
    q, k, v = packed(torch.float64)
    expected = torch.func.jvp(
        lambda q: fastattn.reference.attention_varlen(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K), (q,), (q,)
    )
    with pytest.warns(RuntimeWarning, match=r"torch\.func transform"):
        actual = torch.func.jvp(
            lambda q: fastattn.attention_varlen(q, k, v, CU_SEQLENS_Q, CU_SEQLENS_K), (q,), (q,)
        )
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


def test_compile_without_breaks_or_recompiles_across_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fastattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for step, tokens in enumerate((10, 33, 64, 5)):
        q, k, v = (t.requires_grad_() for t in packed(torch.float32, tokens_q=tokens, tokens_k=tokens))
        cu_seqlens = torch.tensor([0, 4, tokens], dtype=torch.int32)
        out = compiled(q, k, v, cu_seqlens)
        torch.testing.assert_close(out, attend(q, k, v, cu_seqlens))
        out.sum().backward()
        if step == 1:
            counter.frame_count = 0
    assert counter.frame_count == 0


Q, K, V = packed(torch.float32)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "padded query": (
        {"query": Q[None]},
        ValueError,
        r"query: got shape \(1, 152, 4, 16\), needs 3 dimensions",
    ),
    "int64 cu_seqlens": (
        {"cu_seqlens_q": CU_SEQLENS_Q.long()},
        TypeError,
        "cu_seqlens_q: got torch.int64, needs int32",
    ),
    "cu_seqlens shape": (
        {"cu_seqlens_k": CU_SEQLENS_K[:3]},
        ValueError,
        r"cu_seqlens_k: got shape \(3,\), needs that of cu_se",
    ),
    "cu_seqlens rank": (
        {"cu_seqlens_q": CU_SEQLENS_Q[None]},
        ValueError,
        r"cu_seqlens_q: got shape \(1, 5\), needs \(batch",
    ),
    "descending": (
        {"cu_seqlens_q": CU_SEQLENS_Q.flip(0)},
        ValueError,
        "cu_seqlens_q: got .150, .*needs ascending",
    ),
    "not from 0": (
        {"cu_seqlens_k": CU_SEQLENS_K + 1},
        ValueError,
        "cu_seqlens_k: got .1, .*needs ascending values from 0",
    ),
    "too many": (
        {"cu_seqlens_q": CU_SEQLENS_Q * 2},
        ValueError,
        r"cu_seqlens_q: got .* to at most 152 \(the tokens\)",
    ),
    "bound": ({"max_seqlen_q": 79}, ValueError, "max_seqlen_q: got 79, needs at least 80"),
    "negative bound": ({"max_seqlen_k": -2}, ValueError, "max_seqlen_k: got -2, needs 0 or more"),
    "tensor bound": (
        {"max_seqlen_k": torch.tensor(90)},
        TypeError,
        "max_seqlen_k: got Tensor, needs an integer",
    ),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes: got shape \(3,\), needs \(4,\)"),
    "heads": ({"query": Q[:, :3]}, ValueError, "key: got 2 heads, which does not divide the query's 3"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn'"),
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_by_name(change: str) -> None:
    wrong, error, message = BAD[change]
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(
            **{
                "query": Q,
                "key": K,
                "value": V,
                "cu_seqlens_q": CU_SEQLENS_Q,
                "cu_seqlens_k": CU_SEQLENS_K,
                **wrong,
            }
        )
