"""Keyword arguments of other libraries are refused with our name for them, at no cost to other calls."""

import inspect
import timeit

import pytest
import torch

import fastattn
from fastattn.ops import spelling
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

Q = torch.zeros(1, 2, 3, 4)
CU_SEQLENS = torch.tensor([0, 3], dtype=torch.int32)
LENGTHS = torch.tensor([3], dtype=torch.int32)
PACKED = (Q[0].transpose(0, 1),) * 3
TARGET = torch.zeros(3, dtype=torch.long)
CALLS = {
    "attention": lambda **o: fastattn.attention(Q, Q, Q, **o),
    "explain": lambda **o: fastattn.explain(Q, Q, Q, **o),
    "attention_varlen": lambda **o: fastattn.attention_varlen(*PACKED, CU_SEQLENS, CU_SEQLENS, **o),
    "explain_varlen": lambda **o: fastattn.explain_varlen(*PACKED, CU_SEQLENS, CU_SEQLENS, **o),
    "attention_kv_cache": lambda **o: fastattn.attention_kv_cache(Q, Q.clone(), Q.clone(), LENGTHS, **o),
    "explain_kv_cache": lambda **o: fastattn.explain_kv_cache(Q, Q.clone(), Q.clone(), LENGTHS, **o),
    "scaled_dot_product_attention": lambda **o: fastattn.scaled_dot_product_attention(Q, Q, Q, **o),
    "softmax": lambda **o: fastattn.softmax(Q, **o),
    "explain_softmax": lambda **o: fastattn.explain_softmax(Q, **o),
    "cross_entropy": lambda **o: fastattn.cross_entropy(Q[0, 0], TARGET, **o),
    "linear_cross_entropy": lambda **o: fastattn.linear_cross_entropy(Q[0, 0], Q[0, 0], TARGET, **o),
    "MultiHeadAttention": lambda **o: fastattn.MultiHeadAttention(8, 2, **o),
}
FUNCTIONS = (
    fastattn.attention, fastattn.attention_varlen, fastattn.attention_kv_cache, fastattn.scaled_dot_product_attention,
    fastattn.softmax, fastattn.explain_softmax, cross_entropy, linear_cross_entropy,
    fastattn.MultiHeadAttention.__init__,
)  # fmt: skip


@pytest.mark.parametrize("call", ["attention", "explain"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("is_causal", "did you mean causal=...: causal='top_left' is torch's alignment"),
        ("dropout", "dropout_p=..."),
        ("attn_mask", "mask=... or bias=...: mask is bool"),
        ("attention_mask", "mask=... or bias=..."),
        ("softmax_scale", "scale=..."),
        ("sm_scale", "scale=..."),
        ("temperature", "1 / temperature"),
        ("window_size", "window=...: a pair"),
        ("sliding_window", "window=..."),
        ("key_padding_mask", "key_lengths=... or mask=...: key_lengths=(B,) where padding is at the end"),
        ("num_kv_heads", "not needed: key and value may have fewer heads"),
        ("enable_gqa", "not needed: key and value may have fewer heads"),
        ("alibi_bias", "alibi_slopes=... or bias=..."),
        ("alibi", "alibi_slopes=..."),
        ("attn_bias", "bias=...: a float"),
        ("logits_soft_cap", "softcap=..."),
        ("soft_cap", "softcap=..."),
        ("s_aux", "sinks=..."),
        ("sink", "sinks=..."),
        ("seed", "dropout_seed=..."),
        ("need_weights", "return_weights=..."),
        ("return_softmax_lse", "return_lse=..."),
        ("document_ids", "segment_ids=..."),
        ("kv_lengths", "key_lengths=..."),
        ("deterministic", "not needed: gradients"),
        ("attn_implementation", "backend=..."),
        ("segment_id", "segment_ids=..."),
        ("retrun_lse", "return_lse=..."),
        ("xyz", "it takes query, key, value, causal, window, mask"),
    ],
)
def test_what_people_type_for_attention(call, word, said):
    with pytest.raises(TypeError) as caught:
        CALLS[call](**{word: None})
    message = str(caught.value)
    assert message.startswith(f"{call}() got an unexpected keyword argument {word!r}; ")
    assert said in message
    assert "unknown" not in message


@pytest.mark.parametrize(
    ("call", "word", "said"),
    [
        ("attention_varlen", "is_causal", "causal=..."),
        ("attention_varlen", "cu_seqlens", "cu_seqlens_q=... or cu_seqlens_k=..."),
        ("attention_varlen", "num_heads_kv", "not needed"),
        ("attention_varlen", "attn_mask", "it takes"),
        ("explain_varlen", "window_size", "window=..."),
        ("attention_kv_cache", "cache_seqlens", "cache_lengths=..."),
        ("attention_kv_cache", "page_table", "block_table=..."),
        ("attention_kv_cache", "softmax_scale", "scale=..."),
        ("attention_kv_cache", "rotary_emb", "rotary_cos=... or rotary_sin=..."),
        ("explain_kv_cache", "is_causal", "causal=..."),
        ("scaled_dot_product_attention", "causal", "is_causal=..."),
        ("scaled_dot_product_attention", "mask", "attn_mask=..."),
        ("scaled_dot_product_attention", "bias", "attn_mask=..."),
        ("scaled_dot_product_attention", "softmax_scale", "scale=..."),
        ("softmax", "axis", "dim=..."),
        ("softmax", "attn_mask", "mask=..."),
        ("softmax", "dtype", "cast"),
        ("softmax", "temperature", "scale=..."),
        ("explain_softmax", "is_causal", "causal=..."),
        ("cross_entropy", "smoothing", "label_smoothing=..."),
        ("cross_entropy", "labels", "target=..."),
        ("cross_entropy", "pad_token_id", "ignore_index=..."),
        ("linear_cross_entropy", "logits_soft_cap", "softcap=..."),
        ("MultiHeadAttention", "window_size", "window=..."),
        ("MultiHeadAttention", "num_key_value_heads", "num_kv_heads=..."),
        ("MultiHeadAttention", "dropout_p", "dropout=..."),
        ("MultiHeadAttention", "alibi_slopes", "alibi=..."),
        ("MultiHeadAttention", "rope", "rotary=..."),
        ("MultiHeadAttention", "d_model", "embed_dim=..."),
    ],
)
def test_what_people_type_for_the_others(call, word, said):
    with pytest.raises(TypeError) as caught:
        CALLS[call](**{word: None})
    assert str(caught.value).startswith(
        f"{call.rpartition('.')[2]}() got an unexpected keyword argument {word!r}; "
    )
    assert said in str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_every_hint_names_a_parameter_of_the_function(call):
    """Whatever keyword is given, the parameters that the message recommends exist."""
    name = call.rpartition(".")[2]
    function = {f.__name__: f for f in FUNCTIONS if f.__name__ != "__init__"}.get(name, fastattn.attention)
    for word in spelling._HINTS:
        if word in inspect.signature(function).parameters or word in ("q", "k", "v"):
            continue
        hint = spelling._hint(word, list(inspect.signature(function).parameters))
        assert hint.startswith("; ")
        meant = [
            part.split("=...")[0]
            for part in hint.removeprefix("; did you mean ").split(" or ")
            if "=..." in part
        ]
        assert all(target in inspect.signature(function).parameters for target in meant)


def test_several_at_once_are_all_named():
    with pytest.raises(TypeError, match=r"'is_causal'.*'dropout'.*dropout_p"):
        fastattn.attention(Q, Q, Q, is_causal=True, dropout=0.1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_signature_does_not_show_it(function):
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert (
        function.__annotations__["unknown"] == "NoReturn"
    )  # so that a type checker refuses what is not there


def test_a_class_shows_its_parameters_too():
    shown = inspect.signature(fastattn.MultiHeadAttention).parameters
    assert "num_kv_heads" in shown
    assert not {"self", "unknown"} & set(shown)


def test_it_compiles_without_a_break():
    compiled = torch.compile(
        lambda q: fastattn.attention(q, q, q, causal=True), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(Q), fastattn.attention(Q, Q, Q, causal=True))


def test_it_costs_next_to_nothing():
    """An empty dictionary and a look at it, against the thousands of nanoseconds of the smallest call."""

    def plain(q, *, causal=False, scale=None):
        return q

    def refusing(q, *, causal=False, scale=None, **unknown):
        if unknown:
            raise TypeError
        return q

    best = [
        min(timeit.repeat(lambda: f(1, causal=True), number=2000, repeat=20)) / 2000  # noqa: B023
        for f in (plain, refusing)
    ]
    assert best[1] - best[0] < 1e-6
