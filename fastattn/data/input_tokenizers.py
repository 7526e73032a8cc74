"""Tokenizers of encoders trained on a corpus: WordPiece, byte-level BPE, and single characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastattn.constants import MAX_INT32
from fastattn.data.checks import check_flag, check_integer, check_texts
from fastattn.data.encoding import InputTokenizer
from fastattn.data.tokenization import BYTES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("wordpiece", "bpe", "characters")


def train_input_tokenizer(
    kind: str,
    documents: Iterable[str],
    vocab_size: int = 8192,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
) -> InputTokenizer:
    """A tokenizer with BERT's special tokens, ids 0 to 4, trained on text; the same documents give the same tokenizer.

    Args:
        kind: "wordpiece", as BERT's; "bpe", byte-level as RoBERTa's, which has no unknown token; "characters", a token
            for each character, which suits Chinese; characters beyond the vocabulary are unknown.
        documents: the text; read twice for "wordpiece", where an iterator is kept as a list.
        vocab_size: most tokens, special ones included, at least the special tokens and the 256 bytes of "bpe" or every
            character of the text of "wordpiece", at a word's beginning and within words.
        lowercase: whether case and accents are dropped; not for "bpe".
        min_frequency: least number of occurrences of a token.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, needs one of {', '.join(KINDS)}")
    check_texts("documents", documents)
    check_integer("vocab_size", vocab_size, len(SPECIAL) + 1, MAX_INT32)
    check_integer("min_frequency", min_frequency, 1, MAX_INT32)
    check_flag("lowercase", lowercase)
    core = _untrained(kind, lowercase)
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "min_frequency": min_frequency,
        "special_tokens": list(SPECIAL),
        "show_progress": False,
    }
    trainer: Any
    if kind == "wordpiece":
        documents = list(documents) if iter(documents) is documents else documents
        every, inner = _characters(core, documents)
        _check_least(vocab_size, len(SPECIAL) + len(every) + len(inner), "the characters of the documents")
        # The library numbers "##x" in the order of a hash table and breaks ties by these numbers, which special tokens
        # get in the given order.
        options["special_tokens"] += [f"##{character}" for character in inner]
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "bpe":
        _check_least(vocab_size, len(SPECIAL) + BYTES, "all bytes")
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    else:
        trainer = trainers.WordLevelTrainer(**options)
    core.train_from_iterator(documents, trainer=trainer)
    if kind == "wordpiece":  # without the "##x" among the tokens that are found in raw text
        learnt, core = core.get_vocab(with_added_tokens=False), _untrained(kind, lowercase)
        core.model = models.WordPiece(vocab=learnt, unk_token="[UNK]")
    special = {token: number for number, token in enumerate(SPECIAL)}
    core.post_processor = processors.BertProcessing(("[SEP]", special["[SEP]"]), ("[CLS]", special["[CLS]"]))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return InputTokenizer(core, mask_token="[MASK]")


def _check_least(vocab_size: int, least: int, what: str) -> None:
    """Refuse a size that the library would exceed."""
    if vocab_size < least:
        raise ValueError(
            f"vocab_size: got {vocab_size}, needs at least {least} for special tokens and {what}"
        )


def _characters(core: tokenizers.Tokenizer, documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """The characters of words, and those that occur within a word after its first, sorted."""
    pieces = {piece for document in documents for piece in document.split()}
    every: set[str] = set()
    inner: set[str] = set()
    for piece in pieces:
        for word, _ in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(piece)):
            every.update(word)
            inner.update(word[1:])
    return sorted(every), sorted(inner)


def _untrained(kind: str, lowercase: bool) -> tokenizers.Tokenizer:
    if kind == "bpe":
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
        return core
    unknown = {"unk_token": "[UNK]"}
    core = tokenizers.Tokenizer(
        models.WordPiece(**unknown) if kind == "wordpiece" else models.WordLevel(**unknown)
    )
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    if kind == "wordpiece":
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
    else:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(tokenizers.Regex("."), "isolated")]
        )
        core.decoder = decoders.Fuse()
    return core
