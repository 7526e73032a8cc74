"""GPT-2's config.json and tensor names, and this package's own format for models that are no GPT-2."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastattn.models.checkpoint.keys import check_keys
from fastattn.models.checkpoint.names import Family, Part
from fastattn.models.config import GPTConfig

# The fields of a GPT2Config. A GPTConfig with another field at a value other than its default is no GPT-2.
_OF_GPT2 = frozenset(
    (
        "model_type",
        "vocab_size",
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "layer_norm_epsilon",
        "initializer_range",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
)
_OWN_OPTIONS = {field.name: field.default for field in fields(GPTConfig) if field.name not in _OF_GPT2}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_FIELDS = frozenset(field.name for field in fields(GPTConfig))
# The values of keys that a GPT2Config leaves out of config.json.
_GPT2_DEFAULTS = {
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1),
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
# Options that we compute at one value only.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
_IGNORED = (
    "n_ctx",  # n_positions once more
    "reorder_and_upcast_attn",  # float32 scores, which we always have
    "summary_type",  # of a head that no language model has
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)


def _read_gpt2(entries: dict[str, Any]) -> GPTConfig:
    check_keys(entries, honoured=_OF_GPT2, ignored=_IGNORED, defaults=_FIXED)
    return GPTConfig(**{**_GPT2_DEFAULTS, **{k: v for k, v in entries.items() if k in _OF_GPT2}})


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    entries = _write_own(config)
    own = [name for name, default in _OWN_OPTIONS.items() if entries[name] != default]
    if own:
        raise ValueError(f"{own[0]}: got {entries[own[0]]!r}, which a GPT-2 does not have")
    return {name: value for name, value in entries.items() if name not in _OWN_OPTIONS}


def _write_own(config: GPTConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


def _read_own(entries: dict[str, Any]) -> GPTConfig:
    missing = [name for name in _SIZES if name not in entries]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, needs the size that the model was saved with")
    check_keys(entries, honoured=_FIELDS, ignored=_IGNORED, defaults=_FIXED)
    return GPTConfig(**{k: v for k, v in entries.items() if k in _FIELDS})


def _block(ours: str, theirs: str | None = None, *, transposed: bool = False) -> Part:
    return Part(f"h.{{i}}.{ours}", (f"transformer.h.{{i}}.{theirs or ours}",), transposed)


_PARTS = (
    Part("wte.weight", ("transformer.wte.weight",)),
    Part("wpe.weight", ("transformer.wpe.weight",)),
    _block("ln_1.weight"),
    _block("ln_1.bias"),
    _block("attn.in_proj_weight", "attn.c_attn.weight", transposed=True),
    _block("attn.in_proj_bias", "attn.c_attn.bias"),
    _block("attn.out_proj.weight", "attn.c_proj.weight", transposed=True),
    _block("attn.out_proj.bias", "attn.c_proj.bias"),
    _block("ln_2.weight"),
    _block("ln_2.bias"),
    _block("mlp.c_fc.weight", transposed=True),
    _block("mlp.c_fc.bias"),
    _block("mlp.c_proj.weight", transposed=True),
    _block("mlp.c_proj.bias"),
    Part("ln_f.weight", ("transformer.ln_f.weight",)),
    Part("ln_f.bias", ("transformer.ln_f.bias",)),
    Part("lm_head.weight", ("lm_head.weight",)),
)
_OWN_PARTS = (
    _block("ln_1_out.weight"),
    _block("ln_1_out.bias"),
    _block("ln_2_out.weight"),
    _block("ln_2_out.bias"),
    _block("attn.alibi_slopes"),
    _block("attn.q_norm.weight"),
    _block("attn.k_norm.weight"),
    *(
        _block(f"{module}.{leaf}")
        for module in ("ln_cross", "cross_attn.q", "cross_attn.kv", "cross_attn.out_proj")
        for leaf in ("weight", "bias")
    ),
    *(
        Part(name, (f"transformer.{name}",))
        for name in ("wtt.weight", "ln_emb.weight", "ln_emb.bias")
    ),
    *(
        Part(name, (name,))
        for name in (
            "lm_transform.dense.weight", "lm_transform.dense.bias", "lm_transform.norm.weight",
            "lm_transform.norm.bias", "lm_head.bias",
        )
    ),
)  # fmt: skip

GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    parts=_PARTS,
    prefix="transformer.",
    dropped=(
        "h.*.attn.bias",  # causal masks that old files carry
        "h.*.attn.masked_bias",
        "score.weight",  # heads of transformers' other GPT2 classes
        "classifier.*",
        "qa_outputs.*",
        "multiple_choice_head.*",
    ),
    read_config=_read_gpt2,
    write_config=_write_gpt2,
)
OWN = Family(
    model_type="fastattn-gpt",
    architectures=("GPT",),
    parts=_PARTS + _OWN_PARTS,
    prefix="transformer.",
    read_config=_read_own,
    write_config=_write_own,
    in_transformers=False,
)
