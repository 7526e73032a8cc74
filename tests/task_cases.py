"""Folders of tiny encoders with random weights and a tokenizer of few words, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encoder_models
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "anna", "maria", "ber", "##lin", "paris", "lives", "in", "works", "for", "acme", "##s", "who", "where", "does",
    "live", "the", "a", "river", ",", ".", "?", "tower", "and", "old", "new", "##er", "good", "bad", "film", "so",
)  # fmt: skip
TEXTS = (
    "Anna lives in Berlin.",
    "Paris, the old tower",
    "so GOOD a film",
    "Maria works for Acmes, in Paris and in Berlin, where the newer river lives.",
    "bad   film?",
    "Zürich",
)
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


def core() -> tokenizers.Tokenizer:
    """A WordPiece tokenizer as BERT's, of few words."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(list(SPECIAL))
    return made


def save_tokenizer(folder: Path) -> Any:
    """Write the tokenizer's files; gives transformers' tokenizer of them."""
    import transformers

    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core(), model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, head: str, family: str = "bert", **changes: Any) -> Any:
    """Write transformers' model with a head and the tokenizer; gives the model and its tokenizer."""
    model = encoder_models.theirs(family, head, **changes)
    model.save_pretrained(folder)
    return model, save_tokenizer(folder)
