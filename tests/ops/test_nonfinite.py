"""Scores that are not finite, hidden keys and numbers beyond float32, on every op and way that takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kv_caches import Cache, expected
from nonfinite import HIDDEN, HIDINGS, Hiding, assert_as_the_formula, check_hidden, hidden_results
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap

import fastattn
from fastattn import reference
from fastattn.integrations import flash_attn
from fastattn.nn.attention import MultiHeadAttention

NAN, INF = math.nan, math.inf


def test_the_row_of_a_nan_query_is_nan() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 5, 5))
    q[0, 0, 2, 0] = NAN
    out, lse, weights = fastattn.attention(q, k, v, return_lse=True, return_weights=True)
    nan = torch.zeros(1, 2, 5, dtype=torch.bool)
    nan[0, 0, 2] = True
    for result in (out, lse[..., None], weights):
        assert torch.equal(result.isnan().all(-1), nan)
        assert torch.equal(result.isnan().any(-1), nan)


def test_a_row_whose_lse_is_0_is_left_alone() -> None:
    """As is what torch's kernel gives to rows in which it finds no largest score."""
    q, k = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 1, 8)
    for v in (torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 1, 8)):
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        assert torch.equal(out, v.expand(1, 1, 3, 8))
        assert torch.equal(lse, torch.zeros(1, 1, 3))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_packed_sequences(value: float) -> None:
    query, key, values = (torch.randn(15, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 4, 4, 12], dtype=torch.int32)
    query[5, 0, 0] = value
    key[2, 1] = value
    for tensor in (query, key, values):
        tensor[12:] = NAN  # belong to no sequence
    for options in ({}, {"causal": True}, {"softcap": 3.0}):

        def formula(dtype: torch.dtype, options: dict[str, Any] = options) -> Any:
            operands = (t.to(dtype) for t in (query, key, values))
            return reference.attention_varlen(*operands, cu_seqlens, cu_seqlens, **options, return_lse=True)

        actual = fastattn.attention_varlen(
            query, key, values, cu_seqlens, cu_seqlens, **options, return_lse=True
        )
        assert_as_the_formula(actual, formula, torch.float32)
        assert bool(actual[1].isnan().any()) or "softcap" in options
        assert not actual[0][12:].any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_caches(kind: str, value: float) -> None:
    """Beyond the lengths the cache holds NaN anyway."""
    cache = Cache([5, 0, 31])
    query = torch.randn(3, 4, 2, 16)
    key, values = torch.randn(3, 2, 2, 16), torch.randn(3, 2, 2, 16)
    query[0, 1, 1, 0], key[1, 0, 0, 3] = value, value
    formula = partial(expected, Cache([5, 0, 31]), kind, query, key, values)
    actual = fastattn.attention_kv_cache(query, **cache.call(kind), key=key, value=values, return_lse=True)
    assert_as_the_formula(actual, formula, torch.float32)
    assert actual[1][0, 1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_module_with_a_nan_query(need_weights: bool) -> None:
    module = MultiHeadAttention(16, 2, batch_first=True)
    x, memory = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    x[0, 2, 3] = NAN
    out, weights = module(x, memory, memory, need_weights=need_weights)
    assert out.isnan().all(-1).tolist() == [[False, False, True, False, False]]
    if weights is not None:
        assert weights.isnan().all(-1).tolist() == [[False, False, True, False, False]]


# Hidden keys


def _composite_results(hiding: Hiding, fill: float) -> dict[str, Tensor]:
    """Of vmap over one more batch, and tangents of forward-mode AD."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return tuple(
            r[0] for r in vmap(lambda *x: fastattn.attention(*x, **options))(q[None], k[None], v[None])
        )

    return hidden_results(hiding, torch.float32, fill, attend=attend)


@pytest.mark.parametrize("hiding", HIDINGS, ids=str)
def test_hidden_keys_under_vmap(hiding: Hiding) -> None:
    if "dropout_p" in hiding.options():
        pytest.skip("the seed's stream is the fused one's only without transforms")
    clean, poisoned = (_composite_results(hiding, fill) for fill in (0.0, NAN))
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name
    assert not (poisoned["dkey"] * HIDDEN[:, None, :, None]).any()


@pytest.mark.parametrize("name", ["mask of pairs", "bias of keys", "segments, causal"])
def test_hidden_keys_under_forward_mode_and_second_derivatives(name: str) -> None:
    options = next(h for h in HIDINGS if h.name == name).options()
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    tangents = tuple(torch.randn_like(t) for t in (q, k, v))

    def results(fill: float) -> list[Tensor]:
        operands = [q, *(t.masked_fill(HIDDEN[:, None, :, None], fill) for t in (k, v))]

        def attend(*x: Tensor) -> Tensor:
            return fastattn.attention(*x, **options)

        _, by_func = jvp(attend, tuple(operands), tangents)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(operands, tangents)]
            by_dual = forward_ad.unpack_dual(attend(*duals)).tangent
        leaves = [t.clone().requires_grad_() for t in operands]
        grads = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        return [by_func, by_dual, *second]

    for clean, poisoned in zip(results(0.0), results(NAN)):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("name", ["mask of keys", "bias of pairs", "segments"])
def test_hidden_keys_in_compiled_code(name: str) -> None:
    hiding = next(h for h in HIDINGS if h.name == name)
    check_hidden(hiding, torch.float32, NAN, attend=torch.compile(fastattn.attention, backend="aot_eager"))


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_hidden_keys_through_sdpa(additive: bool) -> None:
    mask = ~HIDDEN[:, None, None]
    if additive:
        mask = torch.zeros(2, 1, 1, 9).masked_fill(~mask, -INF)
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 9, 9))
    poisoned = [t.masked_fill(HIDDEN[:, None, :, None], NAN).requires_grad_() for t in (k, v)]
    q.requires_grad_()
    out = fastattn.scaled_dot_product_attention(q, *poisoned, attn_mask=mask)
    clean = fastattn.scaled_dot_product_attention(q, *(t.nan_to_num(0.0) for t in poisoned), attn_mask=mask)
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.square().sum(), (q, *poisoned))
    assert not any(g.isnan().any() for g in grads)
    assert all(not (g * HIDDEN[:, None, :, None]).any() for g in grads[1:])


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_hidden_keys_through_a_module(additive: bool, need_weights: bool) -> None:
    module = MultiHeadAttention(16, 2, batch_first=True)
    padding = torch.zeros(2, 9).masked_fill(HIDDEN, -INF) if additive else HIDDEN
    x, memory = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 9, 16)

    def results(fill: float) -> list[Tensor | None]:
        keys = memory.masked_fill(HIDDEN[..., None], fill)
        out, weights = module(x, keys, keys, key_padding_mask=padding, need_weights=need_weights)
        return [out, weights, *torch.autograd.grad(out.square().sum(), x)]

    for clean, poisoned in zip(results(0.0), results(NAN)):
        assert clean is poisoned is None or torch.equal(clean, poisoned)


def test_hidden_keys_with_nan_queries_have_zero_gradients() -> None:
    """The rows of a NaN query and the keys it sees are NaN; the keys that it does not see have a gradient of 0."""
    checked: list[str] = []
    for hiding in HIDINGS:
        options = hiding.options()
        if not {"mask", "segment_ids"} & set(options) or "key_lengths" in options or "bias" in options:
            continue
        q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (5, 9, 9))
        with torch.no_grad():
            q[0, 0, 0] = NAN
        for result in fastattn.attention(q, k, v, **options, return_weights=True):
            grads = torch.autograd.grad(result.square().sum(), (k, v), retain_graph=True, allow_unused=True)
            for grad in grads:
                if grad is not None:
                    assert not (grad.masked_select(HIDDEN[:, None, :, None])).any(), hiding.name
                    checked.append(hiding.name)
    assert {"mask of keys", "mask, dropout and sinks", "segments"} <= set(checked)


# Numbers that float32 does not hold


def _padded(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=dtype) for _ in range(3))
    return q, k, v


def _packed(dtype: torch.dtype) -> tuple[Any, ...]:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    return *(t[0].transpose(0, 1) for t in _padded(dtype)), cu_seqlens, cu_seqlens


def _cached(dtype: torch.dtype) -> tuple[Any, ...]:
    return *_padded(dtype), torch.tensor([4], dtype=torch.int32)


def _flash(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in _padded(dtype))


def _linear(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(4, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype), torch.arange(4)


TAKES: dict[str, tuple[Callable[..., Any], Callable[[torch.dtype], tuple[Any, ...]], str]] = {
    "attention scale": (fastattn.attention, _padded, "scale"),
    "attention softcap": (fastattn.attention, _padded, "softcap"),
    "varlen scale": (fastattn.attention_varlen, _packed, "scale"),
    "varlen softcap": (fastattn.attention_varlen, _packed, "softcap"),
    "cache scale": (fastattn.attention_kv_cache, _cached, "scale"),
    "cache softcap": (fastattn.attention_kv_cache, _cached, "softcap"),
    "sdpa scale": (fastattn.scaled_dot_product_attention, _padded, "scale"),
    "flash softmax_scale": (flash_attn.flash_attn_func, _flash, "softmax_scale"),
    "flash softcap": (flash_attn.flash_attn_func, _flash, "softcap"),
    "softmax scale": (fastattn.softmax, lambda dtype: (torch.randn(3, 8, dtype=dtype),), "scale"),
    "linear cross-entropy softcap": (fastattn.linear_cross_entropy, _linear, "softcap"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("number", [1e39, 2.0**127, -1e300, 1e-40])
@pytest.mark.parametrize("name", TAKES)
def test_numbers_beyond_float32(name: str, number: float, dtype: torch.dtype) -> None:
    function, operands, option = TAKES[name]
    capped = option == "softcap"
    if function is flash_attn.flash_attn_func and capped and number < 0:
        return  # no cap, there
    fits = dtype == torch.float64 or (number == 1e-40 and not capped)
    if fits and not (capped and number < 0):
        results = function(*operands(dtype), **{option: number})
        for result in results if isinstance(results, tuple) else (results,):
            assert bool(result.isfinite().all())
        return
    spelled = "scale" if "scale" in option else option
    with pytest.raises(ValueError, match=spelled):
        function(*operands(dtype), **{option: number})


def test_a_module_refuses_a_softcap_beyond_its_dtype() -> None:
    with pytest.raises(ValueError, match="softcap: got 1e\\+39"):
        MultiHeadAttention(16, 2, softcap=1e39)
    assert MultiHeadAttention(16, 2, softcap=1e39, dtype=torch.float64).softcap == 1e39


@pytest.mark.parametrize("number", [1.7e38, -1.7e38])
def test_the_largest_scale_gives_numbers(number: float) -> None:
    """Scores of 0 stay 0 and others overflow: to NaN above, to no weight below."""
    q = torch.tensor([[[[0.0, 0.0]], [[5.0, 0.0]], [[-5.0, 0.0]]]])
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(1, 3, 2, 2)
    out, lse = fastattn.attention(q, k, k, scale=number, return_lse=True)
    of_sign = 1 if number > 0 else 2
    torch.testing.assert_close(lse[0, 0, 0], torch.tensor(2.0).log())
    assert lse[0, of_sign].isnan().all()
    assert out[0, of_sign].isnan().all()
    assert lse[0, 3 - of_sign].tolist() == [0.0]
    assert out[0, 3 - of_sign].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("number", [1e39, -1e39, torch.finfo(torch.float64).min])
def test_a_float64_bias_saturates(number: float, softcap: float | None, transformed: bool) -> None:
    """A number no float32 holds counts as the nearest that is one."""
    q, k, v = (torch.randn(2, 2, n, 8) for n in (4, 6, 6))
    bias = torch.randn(4, 6, dtype=torch.float64)
    bias[1, 2] = bias[2] = number
    bias[3, 1] = -INF
    options: dict[str, Any] = {"softcap": softcap, "return_lse": True}

    def attend(b: Tensor) -> tuple[Tensor, ...]:
        if not transformed:
            return fastattn.attention(q, k, v, bias=b, **options)
        return tuple(r[0] for r in vmap(lambda x: fastattn.attention(x, k, v, bias=b, **options))(q[None]))

    leaf = bias.clone().requires_grad_()
    out, lse = attend(leaf)
    nearest = math.copysign(torch.finfo(torch.float32).max, number)
    wanted = reference.attention(
        *(t.double() for t in (q, k, v)), bias=bias.clamp(max=nearest) if number > 0 else
        torch.where(bias.isinf(), bias, bias.clamp(min=nearest)), **options,
    )  # fmt: skip
    torch.testing.assert_close(
        out[:, :, [0, 1, 3]].double(), wanted[0][:, :, [0, 1, 3]], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out[:, :, 2], v.mean(2), rtol=1e-5, atol=1e-5)  # all its keys tie
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.dtype == torch.float64
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("option", ["sinks", "alibi_slopes"])
def test_other_float64_terms_saturate(option: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    term = torch.tensor([1e39, 0.5], dtype=torch.float64, requires_grad=True)
    out, lse = fastattn.attention(q, k, v, **{option: term}, causal=True, return_lse=True)
    largest = torch.finfo(torch.float32).max

    def formula(dtype: torch.dtype) -> list[Tensor]:
        operands = (t.to(dtype) for t in (q, k, v))
        given = term.detach().clamp(max=largest).to(dtype)
        return [reference.attention(*operands, **{option: given}, causal=True)]

    assert_as_the_formula([out], formula, torch.float32)
    assert bool(lse.isfinite().all())
    (grad,) = torch.autograd.grad(out.sum(), term)
    assert bool(grad.isfinite().all())


def test_float64_computes_them() -> None:
    q, k, v = _padded(torch.float64)
    out = fastattn.attention(q, k, v, softcap=1e39)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
