"""`scaled_dot_product_attention` on every layout: shapes, strides, empty sizes, numbers that are not finite."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastattn import scaled_dot_product_attention as sdpa

E = 8


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def strided(tensor, kind):
    """The same values in other memory."""
    if kind == "heads inside":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "every second":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -2).flatten(-3, -2)[..., ::2, :]
    if kind == "last dimension outside":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "offset":
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)
    if kind == "reversed batch":
        return tensor.flip(0).contiguous().flip(0)
    return tensor


KINDS = ("plain", "heads inside", "every second", "last dimension outside", "offset", "reversed batch")


def both(tensors, mask=None, **options):
    """Output and gradients by ours and by torch's, compared."""
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        sources = [t.detach().requires_grad_() for t in tensors]
        out = function(*sources, mask, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, sources, weight)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    return results[0][0]


@pytest.mark.parametrize(
    "kinds", [*zip(KINDS, KINDS[1:] + KINDS[:1], KINDS[2:] + KINDS[:2]), *zip(KINDS, KINDS, KINDS)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_strides(kinds, causal):
    tensors = [strided(normal(2, 3, n, E), kind) for n, kind in zip((5, 7, 7), kinds)]
    both(tensors, is_causal=causal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boolean", [False, True])
def test_strides_of_masks(kind, boolean):
    tensors = [normal(2, 3, n, E) for n in (5, 7, 7)]
    mask = strided(normal(2, 3, 5, 7), kind)
    both(tensors, mask > -0.5 if boolean else mask)


@pytest.mark.parametrize("expanded", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_expanded_operands(expanded):
    """Memory that several entries of the batch or several heads share; gradients come back in full."""
    tensors = [normal(2, 3, n, E) for n in (5, 7, 7)]
    for position in expanded:
        one = normal(1, 1, tensors[position].shape[2], E)
        tensors[position] = one.expand(2, 3, -1, -1)
    both(tensors)
    source = normal(1, 1, 7, E).requires_grad_()
    grads = [
        torch.autograd.grad(
            f(tensors[0], source.expand(2, 3, -1, -1), source.expand(2, 3, -1, -1)).sum(), source
        )
        for f in (sdpa, F.scaled_dot_product_attention)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 1, 1, 7), (1, 3, 5, 1), (5, 7), (7,), (1, 1, 1, 1)])
@pytest.mark.parametrize("boolean", [False, True])
def test_expanded_masks(shape, boolean):
    mask = normal(*shape)
    mask = (mask > -5 if boolean else mask).expand(2, 3, 5, 7)
    both([normal(2, 3, n, E) for n in (5, 7, 7)], mask)


@pytest.mark.parametrize(("queries", "keys"), list(itertools.product([1, 3, 17], [1, 4, 33])))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_causal_lengths_and_grouped_heads(queries, keys, heads):
    query, key, value = (
        normal(2, heads[0], queries, E),
        normal(2, heads[1], keys, E),
        normal(2, heads[1], keys, E + 3),
    )
    both([query, key, value], is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("option", ["plain", "causal", "mask", "gqa"])
def test_empty_sizes(sizes, option):
    batch, heads, queries, keys = sizes
    tensors = [normal(batch, heads, n, E) for n in (queries, keys, keys)]
    options = {"causal": {"is_causal": True}, "gqa": {"enable_gqa": True}}.get(option, {})
    mask = normal(batch, 1, queries, keys) if option == "mask" else None
    sources = [t.requires_grad_() for t in tensors]
    out = sdpa(*sources, mask, **options)
    assert out.shape == (batch, heads, queries, E)
    assert not out.any()
    for grad, source in zip(torch.autograd.grad(out.sum(), sources), sources):
        assert grad.shape == source.shape
        assert not grad.any()


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_seen_and_stay_in_their_head(where, number):
    tensors = {"query": normal(1, 2, 5, E), "key": normal(1, 2, 5, E), "value": normal(1, 2, 5, E)}
    clean = sdpa(*tensors.values(), is_causal=True)
    tensors[where] = tensors[where].clone()
    tensors[where][0, 0, 3] = number
    out = sdpa(*tensors.values(), is_causal=True)
    assert torch.equal(out[0, 1], clean[0, 1])
    assert not torch.isfinite(out[0, 0, 3:]).any()


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_dropping_nothing_or_everything(p, masked):
    tensors = [normal(2, 3, n, E) for n in (5, 7, 7)]
    both(tensors, normal(5, 7) if masked else None, dropout_p=p)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_left_to_torch_by_an_override(layout):
    import fastattn

    def attend():
        parts = [torch.randn(n, 3, E, generator=generator) for n in (3, 5)]
        nested = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
        nested = nested.contiguous() if layout is torch.strided else nested
        return F.scaled_dot_product_attention(nested, nested, nested)

    generator = torch.Generator().manual_seed(0)
    expected = attend()
    generator.manual_seed(0)
    with fastattn.sdpa_override(), pytest.warns(RuntimeWarning, match="nested"):
        out = attend()
    for actual, wanted in zip(out.unbind(), expected.unbind()):
        torch.testing.assert_close(actual, wanted)
