"""Keyword arguments as other libraries spell them: the error names ours."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_MASKS = (("mask", "bias", "attn_mask"), "mask is bool, True = attend; bias is float and added to the scores")
_PADDING = (
    ("key_lengths", "mask"),
    "key_lengths=(B,) where padding is at the end, else mask=~key_padding_mask[:, None, None, :]",
)
_HEADS = (("num_kv_heads",), "")
_CAUSAL = (("causal", "is_causal"), "causal='top_left' is torch's alignment, causal=True flash-attn's")
_SCALE = (("scale",), "")
_WINDOW = (("window",), "a pair (left, right) of visible keys; None is unbounded")
_DROPOUT = (("dropout_p",), "apply it in training only")
_SOFTCAP = (("softcap",), "")
_SINKS = (("sinks",), "")
_LENGTHS = (("key_lengths", "cache_lengths"), "")
_WEIGHTS = (("return_weights",), "")
_LSE = (("return_lse",), "")
_SEED = (("dropout_seed",), "an int or one int64 element")
_IGNORED = (("ignore_index",), "")

# A keyword of other libraries -> the parameters it may mean, of which the function's own are suggested, and a note.
_HINTS: dict[str, tuple[tuple[str, ...], str]] = {
    "is_causal": _CAUSAL, "causal_mask": _CAUSAL, "use_causal_mask": _CAUSAL, "causal": _CAUSAL,
    "dropout": _DROPOUT, "dropout_rate": _DROPOUT, "dropout_prob": _DROPOUT, "attn_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT, "p": _DROPOUT, "p_dropout": _DROPOUT, "dropout_p": (("dropout",), ""),
    "attn_mask": _MASKS, "attention_mask": _MASKS, "mask": _MASKS, "src_mask": _MASKS,
    "attn_bias": (("bias", "attn_mask"), "a float tensor, added to the scores"),
    "attention_bias": (("bias", "attn_mask"), "a float tensor, added to the scores"),
    "position_bias": (("bias", "attn_mask"), "a float tensor, added to the scores"),
    "rel_pos_bias": (("bias", "attn_mask"), "a float tensor, added to the scores"),
    "bias": (("bias", "attn_mask"), "a float tensor, added to the scores"),
    "alibi_bias": (("alibi_slopes", "alibi", "bias"), "slopes are (H,) or (B, H); a bias already made goes to bias"),
    "alibi": (("alibi_slopes",), "slopes (H,) or (B, H)"),
    "alibi_slopes": (("alibi",), "True, or slopes (H,)"),
    "use_alibi": (("alibi", "alibi_slopes"), ""),
    "key_padding_mask": _PADDING, "padding_mask": _PADDING, "src_key_padding_mask": _PADDING,
    "softmax_scale": _SCALE, "sm_scale": _SCALE, "qk_scale": _SCALE, "scaling": _SCALE, "scale_factor": _SCALE,
    "temperature": (("scale",), "scale multiplies the scores: 1 / temperature"),
    "window_size": _WINDOW, "sliding_window": _WINDOW, "local_window_size": _WINDOW,
    "num_kv_heads": _HEADS, "num_key_value_heads": _HEADS, "num_heads_kv": _HEADS, "enable_gqa": _HEADS,
    "nheads_k": _HEADS, "n_kv_heads": _HEADS,
    "soft_cap": _SOFTCAP, "logits_soft_cap": _SOFTCAP, "logits_softcap": _SOFTCAP, "logit_softcap": _SOFTCAP,
    "softcapping": _SOFTCAP, "attn_logit_softcapping": _SOFTCAP, "logit_cap": _SOFTCAP, "tanh_softcap": _SOFTCAP,
    "s_aux": _SINKS, "sink": _SINKS, "attention_sinks": _SINKS, "learnable_sink": _SINKS, "sink_bias": _SINKS,
    "seqlens": _LENGTHS, "seq_lens": _LENGTHS, "lengths": _LENGTHS, "kv_lengths": _LENGTHS, "kv_seqlens": _LENGTHS,
    "cache_seqlens": _LENGTHS, "seqused_k": _LENGTHS, "context_lens": _LENGTHS,
    "cu_seqlens": (("cu_seqlens_q", "cu_seqlens_k"), ""),
    "document_ids": (("segment_ids",), ""), "doc_ids": (("segment_ids",), ""), "seq_ids": (("segment_ids",), ""),
    "need_weights": _WEIGHTS, "output_attentions": _WEIGHTS, "return_attn_probs": _WEIGHTS,
    "return_attn_weights": _WEIGHTS, "return_attention_weights": _WEIGHTS, "average_attn_weights": (
        ("return_weights",), "return_weights='mean' averages over heads"),
    "return_softmax_lse": _LSE, "return_logsumexp": _LSE, "output_lse": _LSE, "lse": _LSE,
    "seed": _SEED, "rng_seed": _SEED, "generator": _SEED,
    "page_table": (("block_table",), ""), "block_tables": (("block_table",), ""),
    "rotary_emb": (("rotary_cos", "rotary_sin", "rotary"), ""), "rope": (("rotary", "rotary_cos"), ""),
    "use_rope": (("rotary",), ""),
    "cos": (("rotary_cos",), ""), "sin": (("rotary_sin",), ""),
    "impl": (("backend",), ""), "implementation": (("backend",), ""), "attn_implementation": (("backend",), ""),
    "axis": (("dim",), ""), "log_softmax": (("log",), ""), "is_log": (("log",), ""),
    "weight": (("class_weight",), ""), "class_weights": (("class_weight",), ""), "ce_weight": (("class_weight",), ""),
    "lse_square_scale": (("z_loss",), ""),
    "pad_token_id": _IGNORED, "ignored_index": _IGNORED, "ignore_idx": _IGNORED,
    "smoothing": (("label_smoothing",), ""), "labels": (("target",), ""), "targets": (("target",), ""),
    "input": (("logits", "hidden", "x"), ""), "lm_head_weight": (("weight",), ""),
    "q": (("query",), ""), "k": (("key",), ""), "v": (("value",), ""), "queries": (("query",), ""),
    "keys": (("key",), ""), "values": (("value",), ""), "d_model": (("embed_dim",), ""),
    "n_heads": (("num_heads",), ""), "nhead": (("num_heads",), ""), "heads": (("num_heads",), ""),
    "use_qk_norm": (("qk_norm",), ""), "qk_layernorm": (("qk_norm",), ""),
}  # fmt: skip

_FEWER_HEADS = "it is not needed: key and value may have fewer heads than query"
_NOT_NEEDED = {
    **dict.fromkeys((word for word, hint in _HINTS.items() if hint is _HEADS), _FEWER_HEADS),
    "deterministic": "it is not needed: gradients always are deterministic",
    "dtype": "cast the input, or the result",
}


def without_unknown(function: Function) -> Function:
    """`function` with a signature that hides its `**unknown`, which only collects keywords to be refused."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


def unexpected(function: Callable[..., Any], unknown: Iterable[str], name: str | None = None) -> TypeError:
    """The error for keyword arguments that a function does not have; `name` replaces the function's own name."""
    names = list(inspect.signature(function).parameters)
    hints = [f"keyword argument {word!r}{_hint(word, names)}" for word in unknown]
    return TypeError(f"{name or function.__name__}() got an unexpected {', and '.join(hints)}")


def check(options: Mapping[str, Any], function: Callable[..., Any], name: str) -> None:
    """Refuse options that `function` does not have; the error says `name`, which takes the same options."""
    unknown = options.keys() - inspect.signature(function).parameters.keys()
    if unknown:
        raise unexpected(function, sorted(unknown), name)


def _hint(word: str, names: list[str]) -> str:
    word = word.lower()
    targets, note = _HINTS.get(word, ((), ""))
    meant = [target for target in targets if target in names and target != word]
    if not meant and word in _NOT_NEEDED:
        return f"; {_NOT_NEEDED[word]}"
    if not meant:
        meant, note = difflib.get_close_matches(word, names, n=1), ""
    if not meant:
        return f"; it takes {', '.join(name for name in names if name != 'self')}"
    return f"; did you mean {' or '.join(f'{target}=...' for target in meant)}" + (
        f": {note}" if note else ""
    )
