"""Encoders' config.json and tensor names: BERT, RoBERTa, DistilBERT, ELECTRA and ModernBERT, each with every head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from fastattn.models.bert_config import BertConfig
from fastattn.models.checkpoint.encoder_names import DISCRIMINATOR, KINDS, Kind
from fastattn.models.checkpoint.keys import check_keys
from fastattn.models.checkpoint.names import Family, Part
from fastattn.models.config import LAYER_TYPES
from fastattn.models.fields import size, token_id
from fastattn.models.presets import FAMILY_FIELDS, alternating_layers

# Our class -> endings of transformers' class names after the family's name; the first is written.
HEADS: dict[str, tuple[str, ...]] = {
    "Bert": ("Model",),
    "BertForEmbedding": ("Model",),
    "BertForPreTraining": ("ForPreTraining",),
    "BertForMaskedLM": ("ForMaskedLM",),
    "BertForSequenceClassification": ("ForSequenceClassification",),
    "BertForTokenClassification": ("ForTokenClassification",),
    "BertForQuestionAnswering": ("ForQuestionAnswering",),
}
OLD_NAMES_OF_NORMS = ((".gamma", ".weight"), (".beta", ".bias"))  # as TensorFlow called them


def read_config(kind: str, entries: dict[str, Any], *, discriminator: bool = False) -> BertConfig:
    """The config of a config.json; ValueError begins with a key that cannot be honoured."""
    rows = KINDS[kind]
    names = {**{name: name for name in rows.fields}, **rows.keys}
    special = _READ_TOO.get(kind, ())
    check_keys(entries, honoured={*names.values(), *special}, ignored=rows.ignored, defaults=rows.fixed)
    values = {"model_type": kind, **TRANSFORMERS_DEFAULTS[kind]}
    values |= {ours: entries[theirs] for ours, theirs in names.items() if theirs in entries}
    values["problem_type"] = entries.get("problem_type")
    if entries.get("id2label") is not None:
        values["id2label"] = entries["id2label"]
    else:
        values["num_labels"] = entries.get("num_labels", entries.get("_num_labels"))
    if kind == "roberta":
        if values["pad_token_id"] is None:
            raise ValueError("pad_token_id: got None, which positions of a RoBERTa count from")
        values["position_offset"] = token_id("pad_token_id", values["pad_token_id"]) + 1
    if kind == "distilbert":
        values["token_dropout"] = values.get("hidden_dropout_prob", BertConfig.hidden_dropout_prob)
    if kind == "modernbert":
        values |= _modernbert_values(values, entries)
    if discriminator:
        values |= {
            "token_dense": True, "num_labels": 1, "id2label": None, "token_dropout": 0.0,
            "classifier_activation": values.get("hidden_act", BertConfig.hidden_act),
        }  # fmt: skip
    try:
        return BertConfig(**values)
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        # ModernBERT's one dropout of attention is two of our fields
        theirs = {"attention_probs_dropout_prob": "attention_dropout", **names}.get(name, name)
        raise ValueError(f"{theirs} ({name}){colon}{rest}" if theirs != name else str(error)) from None


def write_config(
    kind: str, config: BertConfig, *, discriminator: bool = False, tied: bool | None = None
) -> dict[str, Any]:
    """The entries of config.json for a config; ValueError names a field that the family does not have.

    Dropouts that the family derives from others are written as those.
    """
    if config.model_type != kind:
        raise ValueError(f"model_type: got {config.model_type!r}, needs {kind!r}")
    if discriminator and config.num_labels != 1:
        raise ValueError(f"num_labels: got {config.num_labels}, a discriminator has 1")
    if tied not in (None, config.tie_word_embeddings):
        raise ValueError(f"tie_word_embeddings: got {config.tie_word_embeddings}, needs {tied}")
    rows = KINDS[kind]
    names = {**{name: name for name in rows.fields}, **rows.keys}
    said = {*names, "model_type", "pooler", "num_labels", "id2label", "problem_type", *_DERIVED}
    if kind == "modernbert":
        said |= {"rope_theta", "local_rope_theta"}
    entries = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    if "embedding_size" in entries:
        entries["embedding_size"] = config.embedding_dim
    if kind == "modernbert":
        entries |= _modernbert_entries(config)
    expected = read_config(kind, {**entries, "model_type": kind}, discriminator=discriminator)
    for field in fields(BertConfig):
        got, known = getattr(config, field.name), getattr(expected, field.name)
        if field.name not in said and got != known:
            raise ValueError(f"{field.name}: got {got!r}, a {kind} folder needs {known!r}")
    if discriminator:
        return entries
    if config.id2label is not None or config.num_labels != 2:
        labels = config.labels()
        entries |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    if config.problem_type is not None:
        entries["problem_type"] = config.problem_type
    return entries


_DERIVED = ("token_dropout", "attention_output_dropout")
# The defaults of transformers' config classes, which files leave out.
TRANSFORMERS_DEFAULTS: dict[str, dict[str, Any]] = {
    **FAMILY_FIELDS,
    "roberta": {
        **FAMILY_FIELDS["roberta"], "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2,
    },
}  # fmt: skip
_READ_TOO = {
    "modernbert": (
        "rope_parameters", "rope_scaling", "global_rope_theta", "local_rope_theta", "global_attn_every_n_layers",
        "attention_dropout",
    ),
}  # fmt: skip


def _modernbert_values(values: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """The fields that a ModernBERT's config.json says in forms of its own."""
    if entries.get("rope_scaling") is not None:
        raise ValueError(f"rope_scaling: got {entries['rope_scaling']!r}, only None is supported")
    ropes = entries.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping) or not all(isinstance(r or {}, Mapping) for r in ropes.values()):
        raise ValueError(f"rope_parameters: got {ropes!r}, needs a dict of a dict for each kind of layer")
    if unknown := [kind for kind in ropes if kind not in LAYER_TYPES]:
        raise ValueError(f"rope_parameters: got {unknown[0]!r}, which is not a kind of layer")
    bases = {}
    for field, kind, old in (
        ("rope_theta", "full_attention", "global_rope_theta"),
        ("local_rope_theta", "sliding_attention", "local_rope_theta"),
    ):
        rope = ropes.get(kind) or {}
        left = {k: v for k, v in rope.items() if k != "rope_theta" and (k, v) != ("rope_type", "default")}
        if left:
            raise ValueError(
                f"rope_parameters: got {left!r} for {kind}, only rope_type 'default' is supported"
            )
        if (base := rope.get("rope_theta", entries.get(old))) is not None:
            bases[field] = base
    dropout = entries.get("attention_dropout", 0.0)
    read = {**bases, "attention_probs_dropout_prob": dropout, "attention_output_dropout": dropout}
    if values.get("layer_types") is None:
        every = size("global_attn_every_n_layers", entries.get("global_attn_every_n_layers", 3))
        layers = size("num_hidden_layers", values["num_hidden_layers"])
        read["layer_types"] = alternating_layers(layers, every)
    read["lm_bias"] = values["classifier_bias"]
    read["lm_activation"] = values["classifier_activation"]
    return read


def _modernbert_entries(config: BertConfig) -> dict[str, Any]:
    ropes = {
        kind: {"rope_type": "default", "rope_theta": base}
        for kind, base in (
            ("full_attention", config.rope_theta), ("sliding_attention", config.local_rope_theta),
        )
    }  # fmt: skip
    return {
        "rope_parameters": ropes,
        "layer_types": list(config.kinds_of_layers),
        "attention_dropout": config.attention_probs_dropout_prob,
        "embedding_dropout": config.embedding_dropout or 0.0,
    }


def _parts(kind: Kind, head: str, trunk: str) -> tuple[Part, ...]:
    """Rows of a class whose trunk's names begin with `trunk`, and of its head."""
    parts = []
    for ours, theirs in kind.trunk.items():
        for leaf in (".weight", ".bias"):
            parts.append(Part(trunk + ours + leaf, tuple(kind.prefix + name + leaf for name in theirs)))
    for ours, name in kind.heads.get(head, {}).items():
        if ours.endswith((".weight", ".bias")):
            parts.append(Part(ours, (name,)))
        else:
            parts += [Part(ours + leaf, (name + leaf,)) for leaf in (".weight", ".bias")]
    return tuple(parts)


def _family(
    model_type: str, name: str, architectures: tuple[str, ...], head: str, tied: bool | None = None
) -> Family:
    kind = KINDS[model_type]
    if tied is False:
        kind = kind._replace(heads={**kind.heads, head: {**kind.heads[head], **own_bias(kind.heads[head])}})
    discriminator = head == DISCRIMINATOR
    read: Callable[[dict[str, Any]], BertConfig] = partial(
        read_config, model_type, discriminator=discriminator
    )
    write: Callable[[BertConfig], dict[str, Any]] = partial(
        write_config, model_type, discriminator=discriminator, tied=tied
    )
    return Family(
        model_type=model_type,
        architectures=architectures,
        parts=_parts(kind, head, "" if name == "Bert" else "bert."),
        prefix=kind.prefix,
        dropped=kind.dropped,
        aliases=OLD_NAMES_OF_NORMS,
        read_config=read,
        write_config=write,
    )


def own_bias(head: dict[str, str]) -> dict[str, str]:
    """The output bias of an untied model, where files also hold the one of a tied model."""
    tied = head.get("decoder.bias")
    return {} if tied is None else {"decoder.bias": head["decoder.weight"].removesuffix("weight") + "bias"}


def _families(name: str) -> tuple[Family, ...]:
    """The rows of one of our classes: a family each, two where an untied output has a bias of its own.

    ELECTRA's discriminator is a classifier of tokens.
    """
    rows = []
    for model_type, kind in KINDS.items():
        if name in ("Bert", "BertForEmbedding") or name in kind.heads:
            architectures = tuple(kind.classes + ending for ending in HEADS[name])
            both = (True, False) if own_bias(kind.heads.get(name, {})) else (None,)
            rows += [_family(model_type, name, architectures, name, tied) for tied in both]
    if name == "BertForTokenClassification":
        rows.append(_family("electra", name, (DISCRIMINATOR,), DISCRIMINATOR))
    return tuple(rows)


# By our class: its families.
FAMILIES_OF: dict[str, tuple[Family, ...]] = {name: _families(name) for name in HEADS}
ENCODERS: tuple[Family, ...] = tuple(row for rows in FAMILIES_OF.values() for row in rows)
