"""Texts and pairs of texts as encoders' inputs: special tokens, types, offsets, and truncation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from fastattn.cache import write_atomically
from fastattn.data.corpora import DataError
from fastattn.data.tokenization import read_settings, token_text, word_pieces

UNLIMITED = 10**9  # model_max_length from here on means none
MASK_SPELLINGS = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class Row:
    """The tokens of a text or a pair; every field has one entry per token."""

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]  # characters of the text that the token belongs to
    sequences: list[int | None]  # 0 or 1, the text of a pair it belongs to; None for special tokens
    cut: int = 0  # number of truncated tokens of the text


class InputTokenizer:
    """The tokenizer of an encoder's folder: tokenizer.json, or BERT's vocab.txt.

    Args:
        core: the `tokenizers.Tokenizer`, with its special tokens; its truncation and padding are switched off.
        mask_token: stands for a missing word; None if there is none.
        max_length: the model's most tokens by the folder; None for no limit.
        typed: whether the second text of a pair has token type 1; if not, all types are 0.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        mask_token: str | None = None,
        max_length: int | None = None,
        typed: bool = True,
    ) -> None:
        self.core = core
        self.core.no_padding()
        self.core.no_truncation()
        self.mask_token = mask_token
        self.mask_id = None if mask_token is None else core.token_to_id(mask_token)
        self.max_length = max_length
        self.typed = typed
        self.changed = False  # whether it makes other tokens than its files

    def isolate(self, pattern: str) -> None:
        """Have each match of a regular expression in the normalised text begin and end a token."""
        split: Any = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        then = self.core.pre_tokenizer
        self.core.pre_tokenizer = split if then is None else pre_tokenizers.Sequence([split, then])
        self.changed = True

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> InputTokenizer:
        """The tokenizer of a folder.

        Raises:
            DataError: the folder holds neither file, or one cannot be parsed.
        """
        folder = Path(directory)
        settings = read_settings(folder / "tokenizer_config.json")
        core = _read_core(folder, settings)
        known = token_text(settings.get("mask_token"))
        mask = next((t for t in (known, *MASK_SPELLINGS) if t and core.token_to_id(t) is not None), None)
        longest = settings.get("model_max_length")
        limit = int(longest) if isinstance(longest, (int, float)) and 0 < longest < UNLIMITED else None
        inputs = settings.get("model_input_names")
        typed = not isinstance(inputs, list) or "token_type_ids" in inputs
        return cls(core, mask_token=mask, max_length=limit, typed=typed)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer also loads."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            f"{name}_token": token
            for name in ("unk", "cls", "sep", "pad", "mask")
            if self.core.token_to_id(token := f"[{name.upper()}]") is not None
        }
        settings: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            **({} if self.mask_token is None else {"mask_token": self.mask_token}),
            **({} if self.max_length is None else {"model_max_length": self.max_length}),
            "model_input_names": ["input_ids", *(["token_type_ids"] if self.typed else []), "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        write_atomically(folder / "tokenizer.json", self.core.to_str(pretty=True) + "\n")
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")

    @property
    def special_counts(self) -> tuple[int, int]:
        """The number of special tokens of a text, and of a pair."""
        return self.core.num_special_tokens_to_add(False), self.core.num_special_tokens_to_add(True)

    def encode(self, texts: Sequence[str | tuple[str, str]], max_length: int | None = None) -> list[Row]:
        """The tokens of each text or pair, truncated to `max_length` in all; of a pair the longer text first."""
        return [rows[0] for rows in self._encode(texts, max_length, 0, "longest_first")]

    def encode_windows(
        self, pairs: Sequence[tuple[str, str]], max_length: int | None, stride: int
    ) -> list[list[Row]]:
        """The tokens of each pair, the second text in windows that overlap by `stride` tokens, without truncation."""
        return self._encode(pairs, max_length, stride, "only_second")

    def _encode(
        self, texts: Sequence[Any], max_length: int | None, stride: int, strategy: str
    ) -> list[list[Row]]:
        if max_length is not None:
            self.core.enable_truncation(max_length, stride=stride, strategy=strategy)
        try:
            found = self.core.encode_batch(list(texts))
        finally:
            self.core.no_truncation()
        whole = strategy == "only_second"  # windows hold all of it
        rows = []
        for text, encoding in zip(texts, found):
            parts = [encoding, *encoding.overflowing] if whole else [encoding]
            cut = 0
            if encoding.overflowing and not whole:
                uncut = self.core.encode(*text) if isinstance(text, tuple) else self.core.encode(text)
                cut = len(uncut.ids) - len(encoding.ids)
            rows.append(
                [
                    Row(
                        p.ids,
                        p.type_ids if self.typed else [0] * len(p.ids),
                        p.offsets,
                        list(p.sequence_ids),
                        cut,
                    )
                    for p in parts
                ]
            )
        return rows


def _read_core(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    whole, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocabulary.is_file():
            return word_pieces(vocabulary, settings)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"{folder}: the tokenizer cannot be read ({error})") from None
    raise DataError(f"{folder}: holds neither tokenizer.json nor vocab.txt")
