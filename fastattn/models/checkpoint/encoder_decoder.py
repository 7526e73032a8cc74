"""Encoder-decoder folders: the rows of an encoder and of a decoder with cross-attention, each behind a prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

from fastattn.models.bert_config import BertConfig
from fastattn.models.checkpoint import encoders
from fastattn.models.checkpoint.encoder_names import KINDS
from fastattn.models.checkpoint.gpt2 import GPT2
from fastattn.models.checkpoint.keys import check_keys
from fastattn.models.checkpoint.names import Family, Part, family_for
from fastattn.models.config import GPTConfig
from fastattn.models.encoder_decoder_config import (
    BERT_DECODERS,
    BERT_FIELDS,
    MODEL_TYPE,
    EncoderDecoderConfig,
    bert_decoder,
)
from fastattn.models.presets import FAMILY_FIELDS

ARCHITECTURE = "EncoderDecoderModel"
# New parameters of a decoder from a checkpoint without cross-attention.
NEW_IN_DECODER = ("h.*.cross_attn.*", "h.*.ln_cross.*")
_TOKENS = ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
_MARKS = {"is_decoder": True, "add_cross_attention": True}


def _pairs(ours: str, *theirs: str, transposed: bool = False) -> list[Part]:
    """The rows of a module's weight and bias."""
    return [
        Part(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed),
        Part(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    ]


_GPT2_BLOCK = "transformer.h.{i}."
_GPT2_PARTS = (
    *GPT2.parts,
    *_pairs("h.{i}.ln_cross", _GPT2_BLOCK + "ln_cross_attn"),
    *_pairs("h.{i}.cross_attn.q", _GPT2_BLOCK + "crossattention.q_attn", transposed=True),
    *_pairs("h.{i}.cross_attn.kv", _GPT2_BLOCK + "crossattention.c_attn", transposed=True),
    *_pairs("h.{i}.cross_attn.out_proj", _GPT2_BLOCK + "crossattention.c_proj", transposed=True),
)


def _bert_parts(kind: str, head: dict[str, str]) -> tuple[Part, ...]:
    """The rows of a BERT or RoBERTa with cross-attention; head: our names in a masked LM's head -> the file's."""
    prefix = KINDS[kind].prefix
    embeddings, layer = f"{prefix}embeddings.", f"{prefix}encoder.layer.{{i}}."
    own, cross = f"{layer}attention.", f"{layer}crossattention."
    projections = tuple(f"{own}self.{name}" for name in ("query", "key", "value"))
    return (
        Part("wte.weight", (embeddings + "word_embeddings.weight",)),
        Part("wpe.weight", (embeddings + "position_embeddings.weight",)),
        Part("wtt.weight", (embeddings + "token_type_embeddings.weight",)),
        *_pairs("ln_emb", embeddings + "LayerNorm"),
        Part("h.{i}.attn.in_proj_weight", tuple(f"{name}.weight" for name in projections)),
        Part("h.{i}.attn.in_proj_bias", tuple(f"{name}.bias" for name in projections)),
        *_pairs("h.{i}.attn.out_proj", own + "output.dense"),
        *_pairs("h.{i}.ln_1", own + "output.LayerNorm"),
        *_pairs("h.{i}.cross_attn.q", cross + "self.query"),
        *_pairs("h.{i}.cross_attn.kv", cross + "self.key", cross + "self.value"),
        *_pairs("h.{i}.cross_attn.out_proj", cross + "output.dense"),
        *_pairs("h.{i}.ln_cross", cross + "output.LayerNorm"),
        *_pairs("h.{i}.mlp.c_fc", layer + "intermediate.dense"),
        *_pairs("h.{i}.mlp.c_proj", layer + "output.dense"),
        *_pairs("h.{i}.ln_2", layer + "output.LayerNorm"),
        *_pairs("lm_transform.dense", head["head.dense"]),
        *_pairs("lm_transform.norm", head["head.norm"]),
        Part("lm_head.weight", (head["decoder.weight"],)),
        Part("lm_head.bias", (head["decoder.bias"],)),
    )


def _read_gpt2(entries: dict[str, Any]) -> GPTConfig:
    return replace(GPT2.read_config(entries), add_cross_attention=True, model_type="gpt2")


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    return GPT2.write_config(replace(config, add_cross_attention=False))


def _read_bert(entries: dict[str, Any], *, kind: str) -> GPTConfig:
    return bert_decoder(encoders.read_config(kind, entries))


def _write_bert(config: GPTConfig, *, kind: str, tied: bool) -> dict[str, Any]:
    if config.tie_word_embeddings != tied:
        raise ValueError(f"tie_word_embeddings: got {config.tie_word_embeddings}, needs {tied}")
    values = {theirs: getattr(config, ours) for theirs, ours in BERT_FIELDS.items()}
    values |= {"model_type": kind, "intermediate_size": config.mlp_dim}
    entries = encoders.write_config(kind, BertConfig(**{**FAMILY_FIELDS[kind], **values}))
    again = _read_bert(entries, kind=kind)
    for field in fields(GPTConfig):
        got, known = getattr(config, field.name), getattr(again, field.name)
        if field.name == "n_inner":
            got, known = config.mlp_dim, again.mlp_dim
        if field.compare and field.name != "dropout" and got != known:
            raise ValueError(f"{field.name}: got {got!r}, which a {kind} decoder does not have")
    return entries


_HEADS = ("pooler.*", "classifier.*", "qa_outputs.*")  # of an encoder's folder, which no decoder has


def _bert(kind: str, *, tied: bool) -> Family:
    of_tied = KINDS[kind].heads["BertForMaskedLM"]
    of_untied = {**of_tied, **encoders.own_bias(of_tied)}
    head, other = (of_tied, of_untied) if tied else (of_untied, of_tied)
    return Family(
        model_type=kind,
        architectures=_ARCHITECTURES[kind],
        parts=_bert_parts(kind, head),
        prefix=KINDS[kind].prefix,
        dropped=(other["decoder.bias"], "cls.seq_relationship.*", *_HEADS, "embeddings.position_ids"),
        aliases=encoders.OLD_NAMES_OF_NORMS,
        read_config=partial(_read_bert, kind=kind),
        write_config=partial(_write_bert, kind=kind, tied=tied),
    )


_ARCHITECTURES = {
    "bert": ("BertLMHeadModel", "BertForMaskedLM", "BertForPreTraining", "BertModel"),
    "roberta": ("RobertaForCausalLM", "RobertaForMaskedLM", "RobertaModel"),
}
# Decoders with cross-attention; of those with one model type, the first that can hold a config is used.
CROSS_DECODERS: tuple[Family, ...] = (
    *(_bert(kind, tied=tied) for kind in BERT_DECODERS for tied in (True, False)),
    replace(
        GPT2,
        parts=_GPT2_PARTS,
        dropped=(*GPT2.dropped, "h.*.crossattention.bias", "h.*.crossattention.masked_bias"),
        read_config=_read_gpt2,
        write_config=_write_gpt2,
    ),
)


def decoder_family(config: GPTConfig) -> Family:
    """The rows of a decoder's folder; ValueError where no family of `CROSS_DECODERS` is such a decoder."""
    return family_for(config, CROSS_DECODERS, "decoder")


def read_decoder(entries: dict[str, Any]) -> GPTConfig:
    """The config of a decoder from its config.json, with cross-attention added."""
    kind = entries.get("model_type")
    for family in CROSS_DECODERS:
        if family.model_type == kind:
            config: GPTConfig = family.read_config({k: v for k, v in entries.items() if k not in _MARKS})
            return config
    known = ", ".join(dict.fromkeys(repr(family.model_type) for family in CROSS_DECODERS))
    raise ValueError(f"model_type: got {kind!r}, needs one of {known}")


def _read(entries: dict[str, Any]) -> EncoderDecoderConfig:
    """The config of a config.json; ValueError begins with the key that cannot be honoured."""
    parts: dict[str, dict[str, Any]] = {}
    for name in ("encoder", "decoder"):
        if not isinstance(entries.get(name), dict):
            raise ValueError(f"{name}: got {entries.get(name)!r}, needs that part's config")
        parts[name] = entries[name]
    if entries.get("tie_encoder_decoder"):
        raise ValueError("tie_encoder_decoder: got True, only False is supported")
    check_keys(
        entries,
        honoured=("encoder", "decoder", *_TOKENS),
        ignored=("tie_word_embeddings",),  # the decoder's counts
        defaults={"is_encoder_decoder": True, "vocab_size": parts["decoder"].get("vocab_size")},
    )
    for name, needed in _MARKS.items():
        if parts["decoder"].get(name) is not needed:
            raise ValueError(f"decoder.{name}: got {parts['decoder'].get(name)!r}, needs {needed}")
    for name, part in parts.items():
        if part.get("cross_attention_hidden_size") is not None:
            raise ValueError(
                f"{name}.cross_attention_hidden_size: got {part['cross_attention_hidden_size']!r}, "
                f"only None is supported"
            )
    tokens = {name: entries[name] for name in _TOKENS if name in entries}
    encoder = _named("encoder", _read_encoder, parts["encoder"])
    return EncoderDecoderConfig(encoder, _named("decoder", read_decoder, parts["decoder"]), **tokens)


def _read_encoder(entries: dict[str, Any]) -> BertConfig:
    kind = entries.get("model_type")
    if kind not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"model_type: got {kind!r}, needs one of {known}")
    return encoders.read_config(kind, entries)


def _named(part: str, read: Callable[[dict[str, Any]], Any], entries: dict[str, Any]) -> Any:
    try:
        return read(entries)
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None


def _write(config: EncoderDecoderConfig, *, encoder: Family, decoder: Family) -> dict[str, Any]:
    for name, family in (("encoder", encoder), ("decoder", decoder)):
        kind = getattr(config, name).model_type
        if kind is not None and kind != family.model_type:
            raise ValueError(f"{name}: got a {kind}, needs a {family.model_type}")
    return {
        "is_encoder_decoder": True,
        "encoder": {"model_type": encoder.model_type, **encoder.write_config(config.encoder)},
        "decoder": {"model_type": decoder.model_type, **decoder.write_config(config.decoder), **_MARKS},
        **{name: getattr(config, name) for name in _TOKENS},
    }


def _family(encoder: Family, decoder: Family) -> Family:
    def behind(prefix: str, family: Family, *, strip: bool) -> list[Part]:
        drop = family.prefix if strip else ""
        return [
            replace(
                part,
                ours=f"{prefix}{part.ours}",
                theirs=tuple(prefix + name.removeprefix(drop) for name in part.theirs),
            )
            for part in family.parts
        ]

    return Family(
        model_type=MODEL_TYPE,
        architectures=(ARCHITECTURE,),
        parts=(
            *behind("encoder.", encoder, strip=True),  # a bare model, without a prefix of its own
            *behind("decoder.", decoder, strip=False),
            *_pairs("enc_to_dec_proj", "enc_to_dec_proj"),
        ),
        dropped=(
            *(f"encoder.{pattern}" for pattern in encoder.dropped),
            *(f"decoder.{start}{pattern}" for pattern in decoder.dropped for start in ("", decoder.prefix)),
        ),
        aliases=encoder.aliases,
        read_config=_read,
        write_config=partial(_write, encoder=encoder, decoder=decoder),
    )


ENCODER_DECODERS: tuple[Family, ...] = tuple(
    _family(encoder, decoder) for encoder in encoders.FAMILIES_OF["Bert"] for decoder in CROSS_DECODERS
)
