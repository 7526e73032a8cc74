"""Passages for masked language models: parts of a document's tokens, or two runs of sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.data.packing import batched_texts
from fastattn.evaluation.words import SENTENCE_END

SHORTER = 0.1  # share of pairs with a random shorter length
SENTENCES = re.compile(SENTENCE_END + r"|\n+")
SEED = 0  # of the passages


class Passage(NamedTuple):
    """Tokens of a passage. words: each token's word by number, -1 for special tokens; follows: None without pairs."""

    ids: list[int]
    types: list[int]
    words: list[int]
    follows: int | None  # 0 if the second part follows the first, else 1


class Around(NamedTuple):
    """The special tokens before, between and after the tokens of a text and of a pair, with their types."""

    single: tuple[list[int], list[int]]
    pair: tuple[list[int], list[int], list[int]]
    pair_types: tuple[int, int]  # of the first and second text

    @classmethod
    def of(cls, tokenizer: InputTokenizer) -> Around:
        """The special tokens that the tokenizer puts there."""
        one, two = tokenizer.encode(["a", ("a", "a")])
        at = [i for i, s in enumerate(one.sequences) if s is not None]
        first = [i for i, s in enumerate(two.sequences) if s == 0]
        second = [i for i, s in enumerate(two.sequences) if s == 1]
        return cls(
            (one.ids[: at[0]], one.ids[at[-1] + 1 :]),
            (two.ids[: first[0]], two.ids[first[-1] + 1 : second[0]], two.ids[second[-1] + 1 :]),
            (two.types[first[0]], two.types[second[0]]),
        )

    def passage(self, tokens: list[int], words: list[int]) -> Passage:
        """One text with its special tokens."""
        front, back = self.single
        ids = [*front, *tokens, *back]
        return Passage(ids, [0] * len(ids), [*[-1] * len(front), *words, *[-1] * len(back)], None)

    def pair_of(self, a: Tokens, b: Tokens, follows: int) -> Passage:
        """Two texts with their special tokens."""
        front, middle, back = self.pair
        ids = [*front, *a.ids, *middle, *b.ids, *back]
        offset = max(a.words, default=-1) + 1
        words = [
            *[-1] * len(front),
            *a.words,
            *[-1] * len(middle),
            *(word + offset for word in b.words),
            *[-1] * len(back),
        ]
        types = [self.pair_types[0]] * (len(front) + len(a.ids) + len(middle))
        return Passage(ids, types + [self.pair_types[1]] * (len(b.ids) + len(back)), words, follows)


class Tokens(NamedTuple):
    """Tokens of a part of a text, and the number of the word that each belongs to."""

    ids: list[int]
    words: list[int]

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """Parts concatenated, with consecutive word numbers."""
        ids: list[int] = []
        words: list[int] = []
        for each in parts:
            offset = words[-1] + 1 if words else 0
            ids += each.ids
            words += [word + offset for word in each.words]
        return cls(ids, words)

    def pieces(self, most: int) -> Iterator[Tokens]:
        """Parts of at most `most` tokens."""
        for first in range(0, len(self.ids), most):
            words = self.words[first : first + most]
            yield Tokens(self.ids[first : first + most], [w - words[0] if w >= 0 else -1 for w in words])


def _tokens_of(tokenizer: InputTokenizer, texts: Sequence[str]) -> list[Tokens]:
    found = tokenizer.core.encode_batch(list(texts), add_special_tokens=False)
    return [Tokens(e.ids, [-1 if word is None else word for word in e.word_ids]) for e in found]


def singles(
    tokenizer: InputTokenizer, texts: Iterable[str], longest: int, around: Around
) -> Iterator[Passage]:
    """Each document's tokens in passages of at most `longest` tokens; none spans two documents."""
    room = longest - sum(map(len, around.single))
    _check_room(room, longest)
    for some in batched_texts(texts):
        for tokens in _tokens_of(tokenizer, some):
            for piece in tokens.pieces(room):
                yield around.passage(*piece)


def sentences_of(
    tokenizer: InputTokenizer, texts: Iterable[str], longest: int, around: Around
) -> Iterator[list[Tokens]]:
    """The tokens of each document's sentences, of which a pair of `longest` tokens holds two: longer ones are divided.

    Documents without a token are left out.
    """
    most = _pair_room(longest, around) // 2
    for text in texts:
        sentences = [part for part in SENTENCES.split(text) if part.strip()]
        tokens = [piece for t in _tokens_of(tokenizer, sentences) for piece in t.pieces(most)]
        if tokens:
            yield tokens


def pairs(documents: Sequence[Sequence[Tokens]], longest: int, around: Around) -> Iterator[Passage]:
    """Passages of two runs of sentences; as for BERT, the second is from another document half of the time.

    Every token of a document is in a passage. What does not fit is of the other document's run, which is truncated.

    Args:
        documents: the sentences of each, as `sentences_of` divides them for `longest` and `around`.
    """
    room = _pair_room(longest, around)
    if len(documents) < 2:
        raise DataError(
            f"data: holds {len(documents)} document with a token, next_sentence needs at least two"
        )
    random = np.random.default_rng(SEED)
    for number, document in enumerate(documents):
        yield from _pairs_of(documents, number, document, room, around, random)


def _pairs_of(
    documents: Sequence[Sequence[Tokens]],
    number: int,
    document: Sequence[Tokens],
    room: int,
    around: Around,
    random: np.random.Generator,
) -> Iterator[Passage]:
    place = 0
    while place < len(document):
        target = room if random.random() >= SHORTER else int(random.integers(2, room + 1))
        end, length = place, 0
        while end < len(document) and length < target and length + len(document[end].ids) <= room:
            length += len(document[end].ids)
            end += 1
        run = document[place:end]
        cut = int(random.integers(1, len(run))) if len(run) > 1 else 1
        first = Tokens.joined(run[:cut])
        if len(run) == 1 or random.random() < 0.5:
            other = documents[(number + int(random.integers(1, len(documents)))) % len(documents)]
            begins = int(random.integers(len(other)))
            second, follows = Tokens.joined(other[begins : begins + len(run)]), 1
            place += cut  # unused sentences come next
        else:
            second, follows = Tokens.joined(run[cut:]), 0
            place = end
        yield around.pair_of(first, _head(second, room - len(first.ids)), follows)


def _pair_room(longest: int, around: Around) -> int:
    """Tokens of both texts of a pair."""
    room = longest - sum(map(len, around.pair))
    _check_room(room - 1, longest)
    return room


def _head(tokens: Tokens, count: int) -> Tokens:
    return Tokens(tokens.ids[:count], tokens.words[:count])


def _check_room(room: int, longest: int) -> None:
    if room < 1:
        raise DataError(f"task.max_length: got {longest}, needs more than the special tokens")
