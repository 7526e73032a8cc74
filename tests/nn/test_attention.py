"""MultiHeadAttention is torch.nn.MultiheadAttention to its user: parameters, results, gradients, errors, fast path."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from fastattn import reference
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.positions import Rotary, alibi_slopes, apply_rotary
from numerics import assert_within_rule, plain_in_any_order, share_bound

EMBED, HEADS, BATCH, LEN_Q, LEN_K = 24, 4, 3, 5, 7

CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 10},
    "vdim": {"vdim": 11},
    "kdim, vdim, no bias": {"kdim": 10, "vdim": 11, "bias": False},
    "everything": {"kdim": 10, "vdim": 11, "add_bias_kv": True, "add_zero_attn": True},
}


def pair(seed=0, **options):
    """torch's module and ours, made under the same seed, with random biases so that every parameter matters."""
    modules = []
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(seed)
        modules.append(cls(EMBED, HEADS, dtype=torch.float64, **options))
    theirs, ours = modules
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module, *, batched=True, kind="cross", seed=1):
    """(query, key, value) leaves: one tensor thrice ("self"), twice ("memory") or three tensors ("cross")."""
    generator = torch.Generator().manual_seed(seed)

    def make(length, width):
        shape = (BATCH, length, width) if module.batch_first else (length, BATCH, width)
        shape = shape if batched else (length, width)
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    query = make(LEN_K if kind == "self" else LEN_Q, module.embed_dim)
    if kind == "self":
        return query, query, query
    key = make(LEN_K, module.kdim)
    return (query, key, key) if kind == "memory" else (query, key, make(LEN_K, module.vdim))


def mask_of(shape, kind, seed=2):
    """A bool mask (True = hidden) or a float one that leaves every row something to see; None for kind None."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(shape, generator=generator) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values.masked_fill(hidden, float("-inf")) if kind == "float with -inf" else values


def leaves(query, key, value):
    return list({id(t): t for t in (query, key, value)}.values())


def run(module, tensors, *, weights_count, **options):
    """Output, weights and the gradients of inputs, masks and parameters under a fixed random upstream gradient."""
    masks = {
        name: mask.clone().requires_grad_()
        for name, mask in options.items()
        if isinstance(mask, torch.Tensor) and mask.is_floating_point() and bool(mask.isfinite().all())
    }
    out, weights = module(*tensors, **{**options, **masks})
    generator = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum()
    if weights_count and weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype, generator=generator)).sum()
    wanted = {f"input {i}": t for i, t in enumerate(leaves(*tensors))}
    wanted |= masks | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return out, weights, dict(zip(wanted, grads))


def assert_same(theirs, ours, tensors, **options):
    expected, actual = (run(m, tensors, weights_count=True, **options) for m in (theirs, ours))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-10, atol=1e-12)
    assert actual[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert (grad is None) == (actual[2][name] is None), name
        if grad is not None:
            torch.testing.assert_close(
                actual[2][name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


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


def test_is_causal_needs_a_mask_as_in_torch():
    for module in pair():
        x = inputs(module, kind="self")[0]
        with pytest.raises(RuntimeError, match=r"attn_mask|is_causal"):
            module(x, x, x, is_causal=True)


BAD_CALLS = {
    "4-D query": (lambda q: (q[None], q, q), {}),
    "ranks differ": (lambda q: (q, q[0], q[0]), {}),
    "value shorter": (lambda q: (q, q, q[:, :-1]), {}),
    "wrong width": (lambda q: (q[..., :-1], q, q), {}),
    "batches differ": (lambda q: (q, q[:-1], q[:-1]), {}),
    "integer mask": (lambda q: (q, q, q), {"attn_mask": torch.zeros(LEN_K, LEN_K, dtype=torch.int64)}),
    "mask too small": (lambda q: (q, q, q), {"attn_mask": torch.zeros(2, 2, dtype=torch.bool)}),
    "3-D mask too small": (
        lambda q: (q, q, q),
        {"attn_mask": torch.zeros(2, LEN_K, LEN_K, dtype=torch.bool)},
    ),
    "4-D mask": (lambda q: (q, q, q), {"attn_mask": torch.zeros(1, 1, LEN_K, LEN_K, dtype=torch.bool)}),
    "padding mask 1-D": (lambda q: (q, q, q), {"key_padding_mask": torch.zeros(LEN_K, dtype=torch.bool)}),
    "padding mask size": (lambda q: (q, q, q), {"key_padding_mask": torch.zeros(BATCH, 2, dtype=torch.bool)}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_torch_rejects_is_rejected_by_name(case):
    make, options = BAD_CALLS[case]
    theirs, ours = pair(batch_first=True)
    tensors = make(inputs(theirs, kind="self")[0])
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*tensors, **options)
    with pytest.raises(ValueError, match=r"query|key|value|mask") as actual:
        ours(*tensors, **options)
    if isinstance(expected.value, (AssertionError, RuntimeError)):
        kind = AssertionError if isinstance(expected.value, AssertionError) else RuntimeError
        assert isinstance(actual.value, kind) or case in ("wrong width", "batches differ", "value shorter")


def test_constructor_errors_are_torchs():
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        with pytest.raises(ValueError, match="embed_dim"):
            cls(0, 4)
        with pytest.raises(AssertionError, match="divisible"):
            cls(10, 4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"rotary": Rotary(8)}, "rotary"),
        ({"alibi": torch.ones(3)}, "alibi"),
        ({"add_bias_kv": True, "rotary": True}, "add_bias_kv"),
        ({"add_zero_attn": True, "window": (1, 1)}, "add_zero_attn"),
        ({"add_zero_attn": True, "alibi": True}, "add_zero_attn"),
        ({"backend": "nope"}, "backend"),
        ({"window": (1,)}, "window"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_bad_extras_are_refused_in_the_constructor(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        MultiHeadAttention(EMBED, HEADS, **options)


def test_appended_keys_refuse_what_needs_positions():
    _, ours = pair(batch_first=True, add_bias_kv=True)
    x = inputs(ours, kind="self")[0]
    for options in ({"causal": True}, {"key_lengths": torch.tensor([1, 2, 3])}):
        with pytest.raises(ValueError, match="add_bias_kv"):
            ours(x, x, x, **options)


class Calls:
    """Counts the calls of a module's forward by wrapping its class's."""

    def __init__(self, monkeypatch):
        self.count = 0
        forward = MultiHeadAttention.forward

        def counting(module, *args, **kwargs):
            self.count += not args[0].is_nested  # a nested call makes a dense one
            return forward(module, *args, **kwargs)

        monkeypatch.setattr(MultiHeadAttention, "forward", counting)


def encoder_layer(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True, dtype=torch.float64, **options)
    ours = copy.deepcopy(layer)
    ours.self_attn = MultiHeadAttention(EMBED, HEADS, batch_first=True, dropout=0.1, dtype=torch.float64)
    ours.load_state_dict(layer.state_dict())
    return layer, ours


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_encoder_layer_in_eval_calls_forward(monkeypatch, mode, norm_first):
    theirs, ours = (m.eval() for m in encoder_layer(norm_first=norm_first))
    calls = Calls(monkeypatch)
    x = torch.randn(BATCH, LEN_K, EMBED, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(ours(x), theirs(x))
        assert calls.count == 1
        padding = mask_of((BATCH, LEN_K), "bool")
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding)
        )
        causal = nn.Transformer.generate_square_subsequent_mask(LEN_K, dtype=torch.float64)
        expected = theirs(x, src_mask=causal, is_causal=True)
        torch.testing.assert_close(ours(x, src_mask=causal, is_causal=True), expected)
        assert calls.count == 3


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_in_eval_with_padding(monkeypatch, enable_nested_tensor):
    """nn.TransformerEncoder turns left-aligned padded batches into nested tensors before the layers see them."""
    encoders = [
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor).eval()
        for layer in encoder_layer()
    ]
    calls = Calls(monkeypatch)
    x = torch.randn(BATCH, LEN_K, EMBED, dtype=torch.float64)
    padding = torch.arange(LEN_K) >= torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        expected, actual = (e(x, src_key_padding_mask=padding) for e in encoders)
    assert calls.count == 2
    real = ~padding[..., None]
    torch.testing.assert_close(actual * real, expected * real)


def test_a_fully_padded_sample_stays_finite_in_an_encoder():
    theirs, ours = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval() for layer in encoder_layer()
    )
    x = torch.randn(BATCH, LEN_K, EMBED, dtype=torch.float64)
    padding = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        expected, actual = (e(x, src_key_padding_mask=padding) for e in (theirs, ours))
    assert expected[1].isnan().all()
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_attend_within_their_lengths():
    _, ours = pair(batch_first=True)
    rows = [torch.randn(n, EMBED, dtype=torch.float64) for n in (7, 1, 4)]
    nested = torch.nested.nested_tensor(rows)
    for causal in (False, True):
        out, weights = ours(nested, nested, nested, causal=causal)
        assert weights.shape == (3, 7, 7)
        for got, row in zip(out.unbind(), rows):
            alone = ours(row[None], row[None], row[None], need_weights=False, causal=causal)[0]
            torch.testing.assert_close(got, alone[0])
    with pytest.raises(ValueError, match="nested"):
        ours(nested, nested, nested, key_padding_mask=torch.zeros(3, 7, dtype=torch.bool))
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(ValueError, match="jagged"):
        ours(jagged, jagged, jagged)


def test_transformer_with_decoder():
    torch.manual_seed(0)
    theirs = nn.Transformer(EMBED, HEADS, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    for module in (ours.encoder.layers[0], ours.decoder.layers[0]):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(module, name):
                old = getattr(module, name)
                new = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
                new.load_state_dict(old.state_dict())
                setattr(module, name, new)
    src, tgt = (torch.randn(2, n, EMBED, dtype=torch.float64) for n in (5, 6))
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    for mode in (True, False):
        theirs.train(mode)
        ours.train(mode)
        expected, actual = (m(src, tgt, tgt_mask=causal, tgt_is_causal=True) for m in (theirs, ours))
        torch.testing.assert_close(actual, expected)


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


def by_hand(module, x, **options):
    """Projections, then `reference.attention`, then the output projection, with one head per row of the weights."""
    head_dim, heads, kv_heads = module.head_dim, module.num_heads, module.num_kv_heads
    packed = x @ module.in_proj_weight.T + module.in_proj_bias
    q, k, v = packed.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    if module.q_norm is not None:
        norms = (module.q_norm.weight, module.k_norm.weight)
        eps = torch.finfo(q.dtype).eps
        q, k = (w * t * (t.pow(2).mean(-1, keepdim=True) + eps).rsqrt() for t, w in zip((q, k), norms))
    if module.rotary is not None:
        table = module.rotary.table(torch.arange(x.shape[1]), torch.float64)
        q, k = apply_rotary(q, table), apply_rotary(k, table)
    out = reference.attention(q, k, v, **options)
    return out.transpose(1, 2).flatten(-2) @ module.out_proj.weight.T + module.out_proj.bias


EXTRAS = {
    "num_kv_heads": ({"num_kv_heads": 2}, {}),
    "one kv head": ({"num_kv_heads": 1}, {}),
    "rotary": ({"rotary": True}, {}),
    "window": ({"window": (2, 1)}, {"window": (2, 1)}),
    "alibi": ({"alibi": True}, {"alibi_slopes": alibi_slopes(HEADS)}),
    "softcap": ({"softcap": 0.5}, {"softcap": 0.5}),
    "qk_norm": ({"qk_norm": True}, {}),
    "all": (
        {"num_kv_heads": 2, "rotary": True, "window": (3, 0), "alibi": True, "softcap": 2.0, "qk_norm": True},
        {"window": (3, 0), "alibi_slopes": alibi_slopes(HEADS), "softcap": 2.0},
    ),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", EXTRAS)
def test_extras_do_what_they_say(case, causal):
    options, reference_options = EXTRAS[case]
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 9, EMBED, dtype=torch.float64, requires_grad=True)
    sources = [x, *module.parameters()]
    results = []
    for out in (
        module(x, x, x, causal=causal, need_weights=False)[0],
        by_hand(module, x, causal=causal, **reference_options),
    ):
        results.append((out, torch.autograd.grad(out.square().sum(), sources)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-10)
    for actual, expected in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{"rotary": True}, {"alibi": True}, {"window": (3, 0)}])
def test_positions_count_from_the_last_key(options):
    """The last queries alone give what they give among all; and a causal hint changes nothing but the kernel."""
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    whole = module(x, x, x, causal=True)[0]
    torch.testing.assert_close(module(x[:, 5:], x, x, causal=True)[0], whole[:, 5:])
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        hinted = module(x, x, x, attn_mask=hidden, is_causal=True, need_weights=need_weights)[0]
        torch.testing.assert_close(hinted, whole)
        last = module(x[:, 5:], x, x, attn_mask=hidden[5:], is_causal=True, need_weights=need_weights)[0]
        torch.testing.assert_close(last, whole[:, 5:])
    longer = module(x, x[:, 4:], x[:, 4:], causal=True)[0]
    torch.testing.assert_close(longer[:, 4:], module(x[:, 4:], x[:, 4:], x[:, 4:], causal=True)[0])


def test_repr_names_the_options_in_use():
    plain = repr(MultiHeadAttention(EMBED, HEADS))
    assert "embed_dim=24, num_heads=4" in plain
    assert "rotary" not in plain
    full = repr(
        MultiHeadAttention(EMBED, HEADS, rotary=True, alibi=True, sinks=True, num_kv_heads=2, window=(3, 0))
    )
    assert all(
        name in full
        for name in ("rotary=Rotary(", "alibi=True", "sinks=True", "num_kv_heads=2", "window=(3, 0)")
    )


def test_sinks_take_weight_and_learn():
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, sinks=True, dtype=torch.float64)
    assert "sinks" in dict(module.named_parameters())
    x = torch.randn(2, 6, EMBED, dtype=torch.float64)
    out, weights = module(x, x, x)
    assert (weights.sum(-1) < 1).all()
    torch.testing.assert_close(out, by_hand(module, x, sinks=module.sinks))
    (grad,) = torch.autograd.grad(out.square().sum(), [module.sinks])
    assert (grad != 0).all()


def test_gqa_parameters_are_narrow_and_named_alike():
    module = MultiHeadAttention(EMBED, HEADS, num_kv_heads=2, add_bias_kv=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    kv_dim = 2 * EMBED // HEADS
    assert shapes["in_proj_weight"] == (EMBED + 2 * kv_dim, EMBED)
    assert shapes["in_proj_bias"] == (EMBED + 2 * kv_dim,)
    assert shapes["bias_k"] == (1, 1, kv_dim)
    assert (module.in_proj_bias == 0).all()


def test_segments_and_lengths_hide_what_they_should():
    _, ours = pair(batch_first=True)
    x = torch.randn(1, 8, EMBED, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    out = ours(x, x, x, segment_ids=ids, causal=True, need_weights=False)[0]
    for part in (slice(0, 3), slice(3, 7)):
        alone = ours(x[:, part], x[:, part], x[:, part], causal=True, need_weights=False)[0]
        torch.testing.assert_close(out[:, part], alone)
    short = ours(x, x[:, :5], x[:, :5], need_weights=False)[0]
    poisoned = x.clone()
    poisoned[:, 5:] = float("nan")
    got = ours(x, poisoned, poisoned, key_lengths=torch.tensor([5]), need_weights=False)[0]
    torch.testing.assert_close(got, short)


@pytest.mark.parametrize(
    "options", [{}, {"rotary": True, "num_kv_heads": 2}, {"alibi": True, "window": (4, 0)}]
)
def test_cache_decodes_what_the_whole_sequence_gives(options):
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    cache = KVCache(2, module.num_kv_heads, 9, module.head_dim, dtype=torch.float64)
    whole = module(x, x, x, causal=True, need_weights=False)[0]
    with torch.no_grad():
        parts = [
            module(part, part, part, causal=True, need_weights=False, cache=cache)[0]
            for part in x.split([4, 1, 3, 1], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.length == cache.capacity == 9
    with torch.no_grad(), pytest.raises(ValueError, match="cache"):
        module(x[:, :1], x[:, :1], x[:, :1], causal=True, cache=cache)


def test_cache_refuses_gradients():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 3, EMBED, dtype=torch.float64)
    with pytest.raises(ValueError, match="gradient"):
        ours(x, x, x, cache=KVCache(2, HEADS, 4, EMBED // HEADS, dtype=torch.float64))


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
