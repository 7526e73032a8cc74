"""The configuration of an encoder-decoder: those of its two parts, and the tokens of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastattn.models.bert_config import BertConfig
from fastattn.models.config import GPTConfig
from fastattn.ops.arguments import is_integer

MODEL_TYPE = "encoder-decoder"


@dataclass
class EncoderDecoderConfig:
    """An encoder, a decoder that reads it by cross-attention, and special tokens; names are transformers'.

    Args:
        encoder: a `BertConfig`, of any family.
        decoder: a `GPTConfig`; add_cross_attention is set. `bert_decoder` makes BERT's.
        decoder_start_token_id: the token that every target begins with; None for bos_token_id in generation.
        pad_token_id, bos_token_id, eos_token_id: of targets; the decoder's by default.

    Raises:
        TypeError: encoder or decoder is no config.
        ValueError: a token is none of the decoder's vocabulary.
    """

    encoder: BertConfig
    decoder: GPTConfig
    decoder_start_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, needed in (("encoder", BertConfig), ("decoder", GPTConfig)):
            if not isinstance(getattr(self, name), needed):
                raise TypeError(
                    f"{name}: got {type(getattr(self, name)).__name__}, needs a {needed.__name__}"
                )
        self.decoder = replace(self.decoder, add_cross_attention=True)
        for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(self, name)
            for token in given if isinstance(given, (list, tuple)) else [given]:
                if token is not None and not (is_integer(token) and 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"{name}: got {given!r}, needs a token of the decoder, 0 to {self.vocab_size - 1}"
                    )
            if given is None and name != "decoder_start_token_id":
                setattr(self, name, self._of_decoder(name))

    def _of_decoder(self, name: str) -> Any:
        """The decoder's token; None if it is beyond the vocabulary, as in small models with GPT-2's defaults."""
        value = getattr(self.decoder, name)
        tokens = value if isinstance(value, (list, tuple)) else [value]
        return value if all(token is not None and token < self.vocab_size for token in tokens) else None

    @property
    def model_type(self) -> str:
        """The model_type in config.json."""
        return MODEL_TYPE

    @property
    def vocab_size(self) -> int:
        """The decoder's vocabulary size."""
        return self.decoder.vocab_size

    @property
    def initializer_range(self) -> float:
        """The standard deviation of initialised weights that a folder does not have."""
        return self.decoder.initializer_range

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return {**asdict(self), "encoder": self.encoder.to_dict(), "decoder": self.decoder.to_dict()}


BERT_DECODERS = ("bert", "roberta")  # encoders' model types that are decoders too, with cross-attention
# Field of BertConfig -> field of GPTConfig, for a BERT that is used as a decoder.
BERT_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "type_vocab_size": "type_vocab_size",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
    "layer_norm_eps": "layer_norm_epsilon",
    "lm_activation": "lm_activation",
    "position_offset": "position_offset",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}


def bert_decoder(config: BertConfig) -> GPTConfig:
    """BERT or RoBERTa as a decoder: the same sizes and head, causal, with the norms after each sum.

    Raises:
        ValueError: the config is of another family; the message begins with the field.
    """
    if config.model_type not in BERT_DECODERS:
        known = " or ".join(map(repr, BERT_DECODERS))
        raise ValueError(f"model_type: got {config.model_type!r}, a decoder needs {known}")
    return GPTConfig(
        **{ours: getattr(config, theirs) for theirs, ours in BERT_FIELDS.items()},
        embd_pdrop=config.hidden_dropout_prob,
        post_norm=True,
        lm_transform=True,
        train_pad_embedding=config.pad_token_id is None,
        add_cross_attention=True,
        model_type=config.model_type,
    )
