"""MultiHeadAttention is torch.nn.MultiheadAttention to its user: parameters, results, gradients."""

import copy
import itertools
import warnings

import pytest
import torch
from multi_head_pairs import (
    BATCH,
    CONSTRUCTIONS,
    EMBED,
    HEADS,
    LEN_K,
    LEN_Q,
    assert_same,
    inputs,
    mask_of,
    pair,
)
from torch import nn

from fastattn.nn.attention import MultiHeadAttention
from numerics import assert_within_rule, plain_in_any_order, share_bound


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS.keys())
def test_same_parameters_under_the_same_seed(options, batch_first):
    modules = []
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(7)
        modules.append(cls(EMBED, HEADS, batch_first=batch_first, **options))
    states = [m.state_dict() for m in modules]
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    for name in (
        "embed_dim",
        "num_heads",
        "head_dim",
        "kdim",
        "vdim",
        "dropout",
        "batch_first",
        "add_zero_attn",
    ):
        assert getattr(modules[0], name) == getattr(modules[1], name)


def test_initialisation_leaves_the_generator_where_torch_does():
    draws = []
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(7)
        cls(EMBED, HEADS, add_bias_kv=True)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS.keys())
def test_every_construction_and_layout(options, batch_first, batched, kind):
    theirs, ours = pair(batch_first=batch_first, **options)
    if kind != "cross" and not theirs._qkv_same_embed_dim:
        kind = "cross"
    tensors = inputs(theirs, batched=batched, kind=kind)
    for need_weights, average in ((True, True), (True, False), (False, True)):
        assert_same(theirs, ours, tensors, need_weights=need_weights, average_attn_weights=average)


KINDS = [None, "bool", "float", "float with -inf"]
MASKS = [
    (kind, rank, pad)
    for kind, rank, pad in itertools.product(KINDS, ["2-D", "3-D"], KINDS)
    if kind or rank == "2-D"
]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, CONSTRUCTIONS["everything"]], ids=["plain", "everything"])
@pytest.mark.parametrize(("kind", "rank", "padding"), MASKS)
def test_every_mask(kind, rank, padding, options, need_weights, batched):
    theirs, ours = pair(batch_first=True, **options)
    batch = BATCH if batched else 1
    shape = (LEN_Q, LEN_K) if rank == "2-D" else (batch * HEADS, LEN_Q, LEN_K)
    padding_shape = (BATCH, LEN_K) if batched else (LEN_K,)
    assert_same(
        theirs,
        ours,
        inputs(theirs, batched=batched),
        attn_mask=mask_of(shape, kind),
        key_padding_mask=mask_of(padding_shape, padding, seed=5),
        need_weights=need_weights,
    )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}], ids=["plain", "zero_attn"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_is_causal_is_a_hint_as_in_torch(kind, options, padded, need_weights):
    """The hint replaces the mask exactly where torch lets it: a mask that contradicts it shows which was used."""
    theirs, ours = pair(batch_first=True, **options)
    tensors = inputs(theirs, kind=kind)
    length_q, length_k = tensors[0].shape[1], LEN_K
    for diagonal in (1, 3):
        assert_same(
            theirs,
            ours,
            tensors,
            attn_mask=torch.ones(length_q, length_k, dtype=torch.bool).triu(diagonal),
            key_padding_mask=mask_of((BATCH, LEN_K), "bool") if padded else None,
            is_causal=True,
            need_weights=need_weights,
        )


@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_with_nothing_to_see_give_zero(need_weights):
    theirs, ours = pair(batch_first=True)
    tensors = inputs(theirs, kind="cross")
    padding = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*tensors, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(LEN_Q, EMBED))
    if need_weights:
        assert theirs(*tensors, key_padding_mask=padding)[0][1].isnan().all()
        assert (weights[1] == 0).all()
    grads = torch.autograd.grad(out.sum(), [*tensors, *ours.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][1] == 0).all()
    assert (grads[1][1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_close_as_torch(dtype):
    golden, _ = pair(batch_first=True)
    theirs, ours = (copy.deepcopy(m).to(dtype) for m in pair(batch_first=True))
    tensors = inputs(golden, kind="self")
    exact = golden(*tensors)[0]
    cast = tensors[0].to(dtype)
    plain = plain_in_any_order(lambda: theirs(cast, cast, cast)[0], exact)
    actual = ours(cast, cast, cast)[0]
    assert actual.dtype == dtype
    assert_within_rule(actual, plain, exact)


def test_autocast():
    theirs, ours = (m.float() for m in pair(batch_first=True, add_bias_kv=True))
    x = inputs(ours, kind="self")[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = theirs(x, x, x)[0], ours(x, x, x)[0]
    assert actual.dtype == expected.dtype == torch.bfloat16
    golden = copy.deepcopy(theirs).double()(*[x.double()] * 3)[0]
    assert_within_rule(actual, expected, golden)


def test_dropout_in_training_only_and_seeded():
    _, ours = pair(batch_first=True, dropout=0.5)
    tensors = inputs(ours, kind="self")
    ours.eval()
    assert torch.equal(ours(*tensors)[0], ours(*tensors)[0])
    ours.train()
    torch.manual_seed(0)
    first, weights = ours(*tensors, average_attn_weights=False)
    torch.manual_seed(0)
    again, _ = ours(*tensors, average_attn_weights=False)
    other, _ = ours(*tensors, average_attn_weights=False)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    dropped = (weights == 0).double().mean()
    assert abs(dropped - 0.5) < share_bound(0.5, weights.numel())


def test_dropout_agrees_with_torch_on_average():
    theirs, ours = (m.train() for m in pair(batch_first=True, dropout=0.3))
    x = torch.randn(1, 4, EMBED, dtype=torch.float64).expand(4000, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        expected, actual = (m(x, x, x, need_weights=False)[0] for m in (theirs, ours))
    # six standard deviations of the difference of two means, and of two variances, of 4000 draws each
    of_theirs, of_ours = ((m.mean(0), m.var(0)) for m in (expected, actual))
    assert ((of_theirs[0] - of_ours[0]).abs() < 6 * (2 * of_theirs[1] / 4000).sqrt()).all()
    fourth = (expected - of_theirs[0]).pow(4).mean(0)
    assert ((of_theirs[1] - of_ours[1]).abs() < 6 * (2 * (fourth - of_theirs[1] ** 2) / 4000).sqrt()).all()


def test_deepcopy_and_state_dict_roundtrip(tmp_path):
    _, ours = pair(batch_first=True)
    twin = copy.deepcopy(ours)
    torch.save(ours, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = inputs(ours, kind="self")[0]
    for other in (twin, loaded):
        assert torch.equal(other(x, x, x)[0], ours(x, x, x)[0])
        assert list(other._forward_pre_hooks.values()) == list(ours._forward_pre_hooks.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_breaks():
    _, ours = pair(batch_first=True)
    ours = ours.float().eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, EMBED, requires_grad=True)
    expected = ours(x, x, x, need_weights=False, causal=True)[0]
    actual = compiled(x, x, x, need_weights=False, causal=True)[0]
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (expected, actual)]
    torch.testing.assert_close(*grads)


def test_named_backend_is_used():
    _, ours = pair(batch_first=True)
    ours.backend = "torch"
    x = inputs(ours, kind="self")[0]
    assert ours(x, x, x)[0].shape == x.shape


def test_no_warnings_in_plain_use():
    _, ours = pair(batch_first=True)
    x = inputs(ours, kind="self")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(
            x,
            x,
            x,
            attn_mask=mask_of((LEN_K, LEN_K), "bool"),
            key_padding_mask=mask_of((BATCH, LEN_K), "float"),
        )
