"""`scaled_dot_product_attention` is torch's, argument by argument, in every rank, with the same gradients."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import scaled_dot_product_attention as sdpa
from numerics import assert_within_rule, plain_in_any_order, share_bound

L, S, E, EV = 5, 7, 8, 6


def tensors(query, key, value=None, dtype=torch.float64):
    value = (*key[:-1], EV) if value is None else value
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (query, key, value)]


def results(function, operands, mask=None, **options):
    """Output and the gradients of the operands and of a float mask."""
    sources = [*operands, *([mask] if mask is not None and mask.is_floating_point() else [])]
    out = function(*operands, attn_mask=mask, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, sources, weight)


def assert_same(operands, mask=None, **options):
    for actual, expected in zip(
        results(sdpa, operands, mask, **options),
        results(F.scaled_dot_product_attention, operands, mask, **options),
    ):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


RANKS = {
    "2": ((L, E), (S, E)),
    "3": ((4, L, E), (4, S, E)),
    "4": ((2, 4, L, E), (2, 4, S, E)),
    "5": ((3, 2, 4, L, E), (3, 2, 4, S, E)),
    "6": ((2, 1, 2, 2, L, E), (2, 1, 2, 2, S, E)),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("option", ["plain", "causal", "scale", "bool", "float", "broadcast"])
def test_every_rank_and_option(rank, option):
    query, key = RANKS[rank]
    operands = tensors(query, key)
    full = (*query[:-1], S)
    mask, options = None, {}
    if option == "causal":
        options = {"is_causal": True}
    elif option == "scale":
        options = {"scale": 0.3}
    elif option == "bool":
        mask = torch.rand(full) < 0.6
        mask[..., 0, :] = False
    elif option == "float":
        mask = torch.randn(full, dtype=torch.float64, requires_grad=True)
    elif option == "broadcast":
        mask = torch.randn(L, 1, dtype=torch.float64, requires_grad=True)
    assert_same(operands, mask, **options)


@pytest.mark.parametrize(
    ("query", "shape"),
    [
        ((2, 4, L, E), (2, 1, 1, S)),
        ((2, 4, L, E), (4, L, S)),
        ((2, 4, L, E), (4, 1, S)),
        ((4, L, E), (1, L, S)),
        ((3, 2, 4, L, E), (2, 1, L, S)),
        ((3, 2, 4, L, E), (3, 1, 1, L, S)),
        ((3, 2, 4, L, E), (1, 1, 4, 1, 1)),
    ],
)
def test_masks_broadcast(query, shape):
    operands = tensors(query, (*query[:-2], S, E))
    assert_same(operands, torch.randn(shape, dtype=torch.float64, requires_grad=True))
    assert_same(operands, torch.rand(shape) < 0.7)


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 3, L, E), (1, 3, S, E), (1, 3, S, EV)),
        ((1, 3, L, E), (2, 3, S, E), (2, 3, S, EV)),
        ((2, 4, L, E), (2, 1, S, E), (2, 1, S, EV)),
        ((2, 1, L, E), (2, 4, S, E), (2, 4, S, EV)),
        ((2, 4, L, E), (2, 4, S, E), (2, 1, S, EV)),
        ((2, 2, 3, L, E), (2, 3, S, E), (3, S, EV)),
        ((2, 3, L, E), (S, E), (S, EV)),
    ],
)
def test_leading_dimensions_broadcast(query, key, value):
    assert_same(tensors(query, key, value))


@pytest.mark.parametrize("heads", [(2, 2), (1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("leading", [(), (2,), (3, 2)])
def test_grouped_heads(heads, leading):
    operands = tensors((*leading, 4, L, E), (*leading, heads[0], S, E), (*leading, heads[1], S, EV))
    assert_same(operands, enable_gqa=True)


@pytest.mark.parametrize("shape", [(2, 3, 0, E), (0, 3, L, E)])
def test_empty(shape):
    query, key = torch.randn(shape), torch.randn(*shape[:2], S, E)
    assert sdpa(query, key, key).shape == query.shape


def test_no_keys_give_zero():
    query, key = torch.randn(2, 3, L, E), torch.randn(2, 3, 0, E)
    assert torch.equal(sdpa(query, key, key), torch.zeros_like(query))


def test_fully_masked_rows_are_zero_with_zero_gradients():
    operands = tensors((2, 4, L, E), (2, 4, S, E))
    mask = torch.zeros(L, S, dtype=torch.bool)
    minus_infinity = torch.full((L, S), -torch.inf, dtype=torch.float64, requires_grad=True)
    for result in (*results(sdpa, operands, mask), *results(sdpa, operands, minus_infinity)):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("queries", [S + 3, S - 3])
def test_causal_counts_from_the_first_key(queries):
    assert_same(tensors((1, 2, queries, E), (1, 2, S, E)), is_causal=True)


def formula(q, k, v, attn_mask=None):
    """With scores and weights materialised, in the dtype of the operands."""
    scores = q @ k.transpose(-1, -2) * E**-0.5
    if attn_mask is not None:
        floats = attn_mask.is_floating_point()
        scores = scores + attn_mask if floats else scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_within_the_error_rule(dtype):
    full = torch.randn(2, 4, L, S, dtype=torch.float64)
    doubles = tensors((2, 4, L, E), (2, 4, S, E))
    for mask in (full, full > 0):
        cast = [t.detach().to(dtype).requires_grad_() for t in doubles]
        low = mask if mask.dtype == torch.bool else mask.to(dtype)
        golden_mask = low if low.dtype == torch.bool else low.double()
        golden = results(
            F.scaled_dot_product_attention,
            [t.detach().double().requires_grad_() for t in cast],
            golden_mask.requires_grad_() if golden_mask.is_floating_point() else golden_mask,
        )
        low = low.requires_grad_() if low.is_floating_point() else low
        expected = plain_in_any_order(partial(results, formula, cast, low), golden)
        for name, a, p, g in zip(
            ["out", "dq", "dk", "dv", "dmask"], results(sdpa, cast, low), expected, golden
        ):
            assert_within_rule(a, p, g, name)


def test_half_queries_take_a_float32_mask():
    q, k, v = (t.detach() for t in tensors((2, 4, L, E), (2, 4, S, E), dtype=torch.float16))
    mask = torch.randn(L, S, requires_grad=True)
    out = sdpa(q, k, v, mask)
    assert out.dtype == torch.float16
    golden = formula(q.double(), k.double(), v.double(), mask.double())
    assert_within_rule(out, formula(q, k, v, mask.half()), golden)
    assert torch.autograd.grad(out.sum(), mask)[0].dtype == torch.float32


def test_autocast_as_torch():
    q, k, v = (t.detach() for t in tensors((2, 4, L, E), (2, 4, S, E), dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = sdpa(q, k.half(), v), F.scaled_dot_product_attention(q, k.half(), v)
    assert out.dtype == expected.dtype == torch.bfloat16
    low = [t.half().bfloat16() if t is k else t.bfloat16() for t in (q, k, v)]
    assert_within_rule(out, formula(*low), formula(*(t.double() for t in low)))


def test_dropout_scales_what_it_keeps():
    q = torch.zeros(1, 2, 64, 4)
    value = torch.eye(64).expand(1, 2, 64, 64)
    weights = sdpa(q, q, value, dropout_p=0.25)
    kept = weights != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=share_bound(0.75, kept.numel()))
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 64 / 0.75))
    torch.manual_seed(5)
    first = sdpa(q, q, value, None, 0.25)
    torch.manual_seed(5)
    assert torch.equal(first, sdpa(q, q, value, None, 0.25))
    assert not torch.equal(first, sdpa(q, q, value, None, 0.25))


def test_dropping_everything_gives_zero_as_in_torch():
    operands = tensors((2, 4, L, E), (2, 4, S, E))
    for actual, expected in zip(
        results(sdpa, operands, dropout_p=1.0),
        results(F.scaled_dot_product_attention, operands, dropout_p=1.0),
    ):
        assert torch.equal(actual, expected)
        assert not actual.any()


def test_torchs_causal_objects_stay_structured(monkeypatch):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    from fastattn.ops import sdpa as module

    seen = []
    monkeypatch.setattr(module, "attention", lambda *a, **k: seen.append(k) or fastattn.attention(*a, **k))
    operands = tensors((2, 4, L, E), (2, 4, S, E))
    for make in (causal_lower_right, causal_upper_left):
        out = sdpa(*operands, make(L, S))
        expected = F.scaled_dot_product_attention(*operands, make(L, S))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert [(options["causal"], options["mask"], options["bias"]) for options in seen] == [
        (True, None, None),
        ("top_left", None, None),
    ]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"attn_mask": torch.zeros(L, S), "is_causal": True}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.zeros(L + 1, S)}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.zeros(1, 2, 4, L, S)}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int32)}, TypeError, "attn_mask"),
        ({"attn_mask": [[1.0]]}, TypeError, "attn_mask"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
        ({"dropout_p": -0.5}, ValueError, "dropout_p"),
        ({"is_causal": 1}, TypeError, "is_causal"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa"),
        ({"scale": "a"}, TypeError, "scale"),
        ({"query": torch.zeros(E)}, RuntimeError, "query"),
        ({"query": torch.zeros(2, 4, L, E, dtype=torch.int32)}, TypeError, "query"),
        ({"query": torch.zeros(3, 4, L, E)}, RuntimeError, "broadcast"),
        ({"query": torch.zeros(2, 8, L, E)}, RuntimeError, "heads"),
        ({"query": torch.zeros(2, 6, L, E), "enable_gqa": True}, RuntimeError, "heads"),
        ({"key": torch.zeros(2, 4, S, E + 1)}, ValueError, "key"),
        ({"value": torch.zeros(2, 4, S + 1, E)}, ValueError, "value"),
        ({"value": None}, TypeError, "value"),
        ({"backend": "nope"}, ValueError, "backend"),
    ],
)
def test_refused(change, error, match):
    call = {
        "query": torch.zeros(2, 4, L, E),
        "key": torch.zeros(2, 4, S, E),
        "value": torch.zeros(2, 4, S, E),
    } | change
    with pytest.raises(error, match=match):
        sdpa(**call)


def test_the_signature_is_torchs():
    parameters = inspect.signature(sdpa).parameters
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(parameters) == [*names, "backend"]
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    assert [parameters[n].default for n in names[3:]] == [None, 0.0, False, None, False]
    documented = F.scaled_dot_product_attention.__doc__.partition("(")[2].partition("->")[0]
    assert [documented.index(n) for n in names] == sorted(documented.index(n) for n in names)


def test_compiles_without_a_break():
    def call(q, k, v, mask):
        return sdpa(q, k, v, mask) + sdpa(q, k, v, is_causal=True)

    q, k, v = (t.detach() for t in tensors((2, 4, L, E), (2, 4, S, E), dtype=torch.float32))
    mask = torch.randn(L, S)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), call(q, k, v, mask))
