"""The configuration of encoders: sizes, and every point in which the families of BERT differ, as fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastattn.models import fields as checks
from fastattn.models.config import FULL, LAYER_TYPES, SLIDING
from fastattn.models.presets import ENCODERS, FAMILY_FIELDS
from fastattn.nn.blocks import ACTIVATIONS
from fastattn.ops.arguments import is_integer
from fastattn.spec import MAX_HEAD_DIM

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
HEAD_ACTIVATIONS = (*ACTIVATIONS, "tanh")


@dataclass
class BertConfig:
    """An encoder's sizes and options; names and meanings are transformers' `BertConfig` where it has them.

    The defaults are BERT-base. `FAMILY_FIELDS` has, per `model_type`, the fields in which a family differs from it.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: sizes.
        hidden_act: activation of the MLP, one of `fastattn.nn.blocks.ACTIVATIONS`.
        hidden_dropout_prob: dropout of embeddings and of what attention and MLP add.
        attention_probs_dropout_prob: dropout of attention weights.
        max_position_embeddings: rows of the learned positions; no limit under rotary positions.
        type_vocab_size: token types, 0 for none.
        initializer_range, layer_norm_eps: as named.
        pad_token_id: its embedding gets no gradient; under `position_offset` it has no position.
        bos_token_id, eos_token_id, cls_token_id, sep_token_id: kept for tokenizers, not used by the model.
        tie_word_embeddings: one matrix for the token embedding and the masked LM head.
        model_type: whose format folders are written in: bert, roberta, distilbert, electra or modernbert.
        embedding_size: width of the embeddings, projected to hidden_size where it differs (ELECTRA).
        positions: "learned" or "rotary".
        position_offset: 0, positions are the columns; N, positions count tokens that are not pad_token_id from N on,
            pad tokens stand at N - 1 (RoBERTa: pad_token_id + 1).
        pre_norm: norms before attention and MLP (the first block's attention has none) and a final one, instead of
            norms after each sum.
        gated_mlp: the MLP is c_proj(activation(a) * b), a and b the halves of c_fc(x).
        attention_bias, mlp_bias, norm_bias: whether these have biases.
        layer_types: per layer "full_attention" or "sliding_attention", None for all full.
        local_attention: keys a token sees in sliding layers, half of them on each side, besides itself.
        rope_theta, local_rope_theta: rotary bases of full and of sliding layers.
        embedding_dropout, attention_output_dropout: in place of hidden_dropout_prob; None for that.
        mlp_dropout: dropout before the MLP's second product, in place of hidden_dropout_prob after it.
        pooler: whether `Bert` makes pooler_output, tanh(dense(first token)).
        num_labels: outputs of a classifier; the length of id2label where that is given, else 2 by default.
        id2label: names of the labels.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None for what
            labels and num_labels suggest, as in transformers.
        classifier_pooling: "cls", the first token, or "mean"; what sequence classification reads.
        classifier_activation: of the dense layer in front of classifiers.
        classifier_input_dropout: dropout in front of that layer as well.
        classifier_norm, classifier_bias: whether a norm follows it, and whether it has a bias.
        classifier_dropout: in front of classifiers; None for hidden_dropout_prob.
        token_dropout, qa_dropout: for token classification and question answering; None for classifier_dropout.
        token_dense: token classification has the dense layer too.
        qa_dense: question answering has the dense layer too.
        lm_activation: of the masked LM head; None for hidden_act.
        lm_bias, decoder_bias: whether the masked LM head's dense layer and its output have biases.

    Raises:
        ValueError: a field has the wrong type or is out of range, or fields do not fit each other.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    tie_word_embeddings: bool = True
    model_type: str = "bert"
    embedding_size: int | None = None
    positions: str = "learned"
    position_offset: int = 0
    pre_norm: bool = False
    gated_mlp: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    layer_types: Sequence[str] | None = None
    local_attention: int = 128
    rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    embedding_dropout: float | None = None
    attention_output_dropout: float | None = None
    mlp_dropout: float | None = None
    pooler: bool = True
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = None
    problem_type: str | None = None
    classifier_pooling: str = "cls"
    classifier_activation: str = "tanh"
    classifier_input_dropout: bool = False
    classifier_norm: bool = False
    classifier_bias: bool = True
    classifier_dropout: float | None = None
    token_dropout: float | None = None
    qa_dropout: float | None = 0.0
    token_dense: bool = False
    qa_dense: bool = False
    lm_activation: str | None = None
    lm_bias: bool = True
    decoder_bias: bool = True

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, "
                f"which does not divide hidden_size={self.hidden_size}"
            )
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, which makes hidden_size / num_attention_heads = "
                f"{self.head_dim}, needs a head dim of at most {MAX_HEAD_DIM}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"positions: rotary needs an even head dim, got hidden_size / num_attention_heads = {self.head_dim}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: got {len(self.layer_types)}, needs one for each of num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        if self.positions == "rotary" and self.position_offset:
            raise ValueError(f"position_offset: got {self.position_offset}, needs learned positions")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id: got {self.pad_token_id}, needs less than vocab_size={self.vocab_size}, or None"
            )
        self._settle_labels()

    def _settle_labels(self) -> None:
        if self.id2label is not None:
            if self.num_labels not in (None, len(self.id2label)):
                raise ValueError(
                    f"num_labels: got {self.num_labels}, but id2label names {len(self.id2label)} labels"
                )
            self.num_labels = len(self.id2label)
        elif self.num_labels is None:
            self.num_labels = 2

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def kinds_of_layers(self) -> tuple[str, ...]:
        """Per layer, "full_attention" or "sliding_attention"."""
        return (FULL,) * self.num_hidden_layers if self.layer_types is None else tuple(self.layer_types)

    def labels(self) -> list[str]:
        """The names of the labels, in the order of the outputs."""
        named = self.id2label or {}
        return [named.get(i, f"LABEL_{i}") for i in range(self.num_labels or 0)]

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BertConfig:
        """A row of `fastattn.models.presets.ENCODERS`, with some fields changed; fewer layers are its first ones.

        Raises:
            ValueError: there is no such row, or a field does not fit. TypeError: the config has no field of that name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, needs one of {', '.join(PRESETS)}")
        row = PRESETS[name]
        if "layer_types" in row and is_integer(changes.get("num_hidden_layers")):
            row = {**row, "layer_types": row["layer_types"][: max(int(changes["num_hidden_layers"]), 0)]}
        return cls(**{**row, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {name: preset.fields for name, preset in ENCODERS.items()}


def _label_names(name: str, value: Any) -> dict[int, str]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{name}: got {value!r}, needs a dict from each label's number to its name")
    try:
        names = {int(key): label for key, label in value.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got the keys {list(value)!r}, needs numbers of labels") from None
    if sorted(names) != list(range(len(names))) or not all(
        isinstance(label, str) for label in names.values()
    ):
        raise ValueError(f"{name}: got {value!r}, needs a name for each number from 0 on")
    return {number: names[number] for number in range(len(names))}


def _kinds(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: got {value!r}, needs a list of {FULL} and {SLIDING}")
    return tuple(checks.one_of(LAYER_TYPES)(f"{name}[{i}]", kind) for i, kind in enumerate(value))


_CHECKS: dict[str, checks.Check] = {  # every field has one
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "local_attention",
        ),
        checks.size,
    ),
    **dict.fromkeys(("embedding_size", "num_labels"), checks.or_none(checks.size)),
    **dict.fromkeys(("type_vocab_size", "position_offset"), checks.size_or_0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), checks.probability),
    **dict.fromkeys(
        (
            "embedding_dropout", "attention_output_dropout", "mlp_dropout", "classifier_dropout", "token_dropout",
            "qa_dropout",
        ),
        checks.or_none(checks.probability),
    ),
    **dict.fromkeys(
        ("rope_theta", "local_rope_theta", "layer_norm_eps", "initializer_range"), checks.positive
    ),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "pre_norm", "gated_mlp", "attention_bias", "mlp_bias", "norm_bias", "pooler",
            "classifier_input_dropout", "classifier_norm", "classifier_bias", "token_dense", "qa_dense", "lm_bias",
            "decoder_bias",
        ),
        checks.flag,
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"), checks.or_none(checks.token_id)),
    "eos_token_id": checks.or_none(checks.token_ids),
    "model_type": checks.one_of(tuple(FAMILY_FIELDS)),
    "positions": checks.one_of(("learned", "rotary")),
    "layer_types": checks.or_none(_kinds),
    "hidden_act": checks.one_of(tuple(ACTIVATIONS)),
    "id2label": checks.or_none(_label_names),
    "problem_type": checks.or_none(checks.one_of(PROBLEM_TYPES)),
    "classifier_pooling": checks.one_of(("cls", "mean")),
    "classifier_activation": checks.one_of(HEAD_ACTIVATIONS),
    "lm_activation": checks.or_none(checks.one_of(HEAD_ACTIVATIONS)),
}  # fmt: skip
