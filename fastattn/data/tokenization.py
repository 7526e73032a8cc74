"""Tokenisers: a byte-level BPE trained on a corpus, and any tokenizer.json folder, in the layout transformers reads."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastattn.cache import write_atomically
from fastattn.constants import MAX_INT32
from fastattn.data.checks import check_flag, check_integer, check_text, check_texts
from fastattn.data.corpora import DataError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
UNKNOWN = "<|unknown|>"
CHAT_TEMPLATE = "chat_template.jinja"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ID = 2**32 - 1
SENTENCE_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
BYTES = 256  # the alphabet of a byte-level tokeniser, which can encode every text, without an unknown token


def _plain(number: Any) -> Any:
    """A number of NumPy or torch as Python's."""
    return number.item() if hasattr(number, "item") else number


class Tokenizer:
    """Text to token ids and back, with named special tokens.

    Args:
        core: the `tokenizers.Tokenizer`; its truncation and padding are switched off.
        eos_token: ends every document; must be in the vocabulary.
        pad_token: fills short rows; None uses the end-of-text token.
        settings: further entries of tokenizer_config.json, kept when it is saved.
        chat_template: the template of conversations in Jinja; None if there is none.

    Attributes:
        eos_id: the id of eos_token.
        pad_id: the id of pad_token.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: eos_token or pad_token is not in the vocabulary.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos_token: str,
        pad_token: str | None = None,
        settings: Mapping[str, object] | None = None,
        chat_template: str | None = None,
    ) -> None:
        if not isinstance(core, tokenizers.Tokenizer):
            raise TypeError(f"core: got a {type(core).__name__}, needs a tokenizers.Tokenizer")
        check_text("eos_token", eos_token)
        if pad_token is not None:
            check_text("pad_token", pad_token)
        self.core = core
        self.core.no_padding()  # what a file keeps of these is of the batches of its training
        self.core.no_truncation()
        self.eos_token = eos_token
        self.pad_token = eos_token if pad_token is None else pad_token
        self.eos_id = self._id_of("eos_token", eos_token)
        self.pad_id = self._id_of("pad_token", self.pad_token)
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"settings: got a {type(settings).__name__}, needs a mapping")
        if chat_template is not None:
            check_text("chat_template", chat_template)
        self.settings = dict(settings or {})
        self.chat_template = chat_template

    def _id_of(self, argument: str, token: str) -> int:
        found = self.core.token_to_id(token)
        if found is None:
            raise ValueError(f"{argument}: {token!r} is not in the vocabulary of {self.vocab_size} tokens")
        return found

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1, special tokens included."""
        return self.core.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no special token is added, and special tokens written in the text keep their ids.

        Raises:
            TypeError: text is not a str.
        """
        check_text("text", text)
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, encoded in parallel."""
        check_texts("texts", texts)
        texts = list(texts)
        for text in texts:
            check_text("texts", text)
        return [encoding.ids for encoding in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`.

        Args:
            ids: integers, Python's, NumPy's or torch's; ids beyond the vocabulary give no text.
            skip_special_tokens: leave special tokens out.

        Raises:
            TypeError: ids is not a sequence of integers. ValueError: an id is below 0 or over 2**32 - 1.
        """
        check_flag("skip_special_tokens", skip_special_tokens)
        if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__"):
            raise TypeError(f"ids: got a {type(ids).__name__}, needs a sequence of token ids")
        numbers = [
            i if type(i) is int and 0 <= i <= MAX_ID else check_integer("ids", _plain(i), 0, MAX_ID)
            for i in ids
        ]
        return self.core.decode(numbers, skip_special_tokens=skip_special_tokens)

    def special_texts(self) -> dict[str, str]:
        """The special tokens that the settings name, as "bos_token", each as text."""
        named = {name: token_text(self.settings.get(name)) for name in SPECIAL_NAMES}
        return {name: text for name, text in named.items() if text is not None}

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer also loads.

        A chat template goes to chat_template.jinja.

        Args:
            directory: the folder, which is created if it does not exist.
            max_length: most tokens of a text, written as "model_max_length"; None for none.

        Raises:
            OSError: a file cannot be written.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            **{name: value for name, value in self.settings.items() if name != "chat_template"},
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
        }
        if self.chat_template is not None:
            write_atomically(folder / CHAT_TEMPLATE, self.chat_template)
        if max_length is not None:
            settings["model_max_length"] = max_length
        write_atomically(folder / "tokenizer.json", self.core.to_str(pretty=True) + "\n")
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Load a folder with tokenizer.json (and tokenizer_config.json), or vocab.json and merges.txt, or vocab.txt.

        The end-of-text token is the eos_token or sep_token of tokenizer_config.json, else the end token of the model in
        the same folder.

        Raises:
            DataError: the folder holds none, a file cannot be parsed, or no end-of-text token is named.
        """
        folder = Path(directory)
        settings = read_settings(folder / "tokenizer_config.json")
        core = _read_core(folder, settings)
        eos = token_text(settings.get("eos_token")) or token_text(settings.get("sep_token"))
        eos = eos or _end_of(folder, core)
        if eos is None and core.token_to_id(END_OF_TEXT) is not None:
            eos = END_OF_TEXT
        if eos is None:
            raise DataError(
                f"{folder}: tokenizer_config.json names no eos_token, nor does config.json, and {END_OF_TEXT} is "
                f"not a token"
            )
        try:
            return cls(
                core,
                eos_token=eos,
                pad_token=token_text(settings.get("pad_token")),
                settings=settings,
                chat_template=_chat_template(folder, settings),
            )
        except ValueError as error:
            raise DataError(f"{folder}: {error}") from None


def train_bpe(
    documents: Iterable[str],
    vocab_size: int = 4096,
    *,
    min_frequency: int = 2,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Train a byte-level BPE: from single bytes, merge the most frequent pair until the vocabulary is full.

    The same documents give the same tokeniser on every run and any number of threads. The vocabulary is smaller than
    `vocab_size` if the text has too few pairs that occur `min_frequency` times.

    Args:
        documents: the text; read once.
        vocab_size: number of tokens, the 256 bytes and the special tokens included.
        min_frequency: a pair seen less often is not merged.
        special_tokens: further special tokens beside the end of text (id 0) and padding (id 1).

    Raises:
        TypeError: documents is one text, or an argument has a wrong type.
        ValueError: vocab_size leaves no room for the bytes and special tokens, or min_frequency is below 1.
    """
    check_texts("documents", documents)
    check_texts("special_tokens", special_tokens)
    for token in special_tokens:
        check_text("special_tokens", token)
    special = [END_OF_TEXT, PADDING, *special_tokens]
    check_integer("vocab_size", vocab_size, -(2**63), MAX_INT32)
    check_integer("min_frequency", min_frequency, -(2**63), MAX_INT32)
    if vocab_size < BYTES + len(special):
        raise ValueError(
            f"vocab_size: got {vocab_size}, needs at least {BYTES + len(special)} "
            f"({BYTES} bytes and {len(special)} special tokens)"
        )
    if min_frequency < 1:
        raise ValueError(f"min_frequency: got {min_frequency}, needs at least 1")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_only_texts(documents), trainer=trainer)
    return Tokenizer(core, eos_token=END_OF_TEXT, pad_token=PADDING)


def train_characters(
    documents: Iterable[str], vocab_size: int = 8192, *, min_frequency: int = 1
) -> Tokenizer:
    """A tokeniser with a token for each character, white space included, for Chinese or a small alphabet.

    Characters beyond the `vocab_size` most frequent ones, or with fewer than `min_frequency` occurrences, become
    `<|unknown|>`, which decodes to an empty text. Special tokens are the end of text (id 0),
    padding (1) and the unknown character (2).

    Args:
        documents: the text; read once.
        vocab_size: most tokens, special ones included.
        min_frequency: a character seen less often is unknown.

    Raises:
        TypeError: documents is one text, or an argument has a wrong type.
        ValueError: vocab_size leaves no room for a character, min_frequency is below 1, or there is no text.
    """
    check_texts("documents", documents)
    special = [END_OF_TEXT, PADDING, UNKNOWN]
    check_integer("vocab_size", vocab_size, len(special) + 1, MAX_INT32)
    check_integer("min_frequency", min_frequency, 1, MAX_INT32)
    counts: Counter[str] = Counter()
    for document in _only_texts(documents):
        counts.update(document)
    kept = [character for character, count in counts.items() if count >= min_frequency]
    if not kept:
        raise ValueError("documents: got no character, needs some text")
    kept.sort(key=lambda character: (-counts[character], character))
    tokens = [*special, *kept[: vocab_size - len(special)]]
    core = tokenizers.Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return Tokenizer(core, eos_token=END_OF_TEXT, pad_token=PADDING, settings={"unk_token": UNKNOWN})


def _only_texts(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        check_text("documents", document)
        yield document


def _read_core(folder: Path, settings: Mapping[str, object]) -> tokenizers.Tokenizer:
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    pieces = folder / "vocab.txt"
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocab.is_file() and merges.is_file():
            core = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            core.post_processor = processors.ByteLevel(trim_offsets=False)
            if core.token_to_id(END_OF_TEXT) is not None:
                core.add_special_tokens([END_OF_TEXT])
            return core
        if pieces.is_file():
            return word_pieces(pieces, settings)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise DataError(f"{folder}: the tokeniser cannot be read ({error})") from None
    found = next((name for name in SENTENCE_PIECES if (folder / name).is_file()), None)
    if found is not None:
        raise DataError(
            f"{folder}: holds {found}, needs tokenizer.json, which "
            f"transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) makes of it"
        )
    raise DataError(f"{folder}: holds none of tokenizer.json, vocab.json with merges.txt, and vocab.txt")


def word_pieces(path: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer of a vocabulary."""
    special = {
        name: token_text(settings.get(f"{name}_token")) or f"[{name.upper()}]"
        for name in ("unk", "cls", "sep", "pad", "mask")
    }
    core = tokenizers.Tokenizer(models.WordPiece.from_file(str(path), unk_token=special["unk"]))
    core.normalizer = normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    sep, cls = (core.token_to_id(special[name]) for name in ("sep", "cls"))
    if sep is None or cls is None:
        raise ValueError(f"{path.name} lacks {special['sep']} or {special['cls']}")
    core.post_processor = processors.BertProcessing((special["sep"], sep), (special["cls"], cls))
    known = [token for token in special.values() if core.token_to_id(token) is not None]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    return core


def _end_of(folder: Path, core: tokenizers.Tokenizer) -> str | None:
    """The token that the model's own files name as its end: the first, where they name several."""
    for name in ("generation_config.json", "config.json"):
        found = read_settings(folder / name).get("eos_token_id")
        for each in found if isinstance(found, list) else [found]:
            if isinstance(each, int) and not isinstance(each, bool) and 0 <= each <= MAX_ID:
                token: str | None = core.id_to_token(each)
                if token is not None:
                    return token
    return None


def _chat_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    """The chat template of its own file, else of the settings, else None; of several, the one named default."""
    try:
        if (folder / CHAT_TEMPLATE).is_file():
            return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / CHAT_TEMPLATE}: cannot be read ({error})") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def read_settings(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: holds a {type(settings).__name__}, needs a JSON object")
    return settings


def token_text(value: object) -> str | None:
    """A token as tokenizer_config.json spells it: a string, or an object with its text under "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
