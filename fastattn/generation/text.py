"""The text of a continuation as it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.generation.protocol import Decodes
from fastattn.generation.stopping import StopStrings

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what tokenizers give for bytes that are no character, or not yet one
CONTEXT = 8  # tokens of the prompt that are decoded with the continuation, for spaces at its beginning
UNFINISHED = 3  # most tokens of a character that is not complete: it has four bytes, a token one at least


class Detokenizer:
    """Text of tokens that come one by one.

    A token's text may depend on the tokens before it, and a character may span several tokens. So pending tokens are
    decoded together with the tokens whose text was given last, and the new text is given once it does not end within
    a character.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.before = list(prompt[-CONTEXT:])  # tokens whose text was given
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, often empty within a character."""
        self.pending.append(token)
        given, whole = self._decode(self.before), self._decode(self.before + self.pending)
        if not whole.endswith(UNKNOWN):
            text = whole[len(given) :]
            # special tokens give no text, and so cannot stand in for what is before a token
            self.before = self.pending if text else (self.before + self.pending)[-2 * CONTEXT :]
            self.pending = []
            return text
        if len(self.pending) <= UNFINISHED:
            return ""
        decided = self.pending[:-UNFINISHED]  # bytes that no more tokens can make a character of
        whole = self._decode(self.before + decided)
        self.before, self.pending = decided, self.pending[-UNFINISHED:]
        return whole[len(given) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class RowText:
    """The text of a row's continuation, and which of its tokens may be given with it.

    A token may be returned once all its characters may. A token with a character of a stop string never is.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int], stop_strings: Sequence[str]) -> None:
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self.stops = StopStrings(stop_strings)
        self.pieces: list[str] = []  # not taken yet
        self.safe = 0  # tokens that may be given
        self._ends: list[int] = []  # for each token after those, where its text ends
        self._decoded = self._given = 0  # characters
        self._undecided = 0  # of the last tokens, how many wait for the end of a character

    @property
    def found(self) -> bool:
        """Whether a stop string is complete."""
        return self.stops.found

    def push(self, token: int) -> None:
        """A token joined the row."""
        text = self.detokenizer.push(token)
        waiting = len(self.detokenizer.pending)
        self._decoded += len(text)
        self._ends += [self._decoded] * (self._undecided + 1 - waiting)
        self._undecided = waiting
        self._give(self.stops.push(text))

    def finish(self) -> None:
        """No more tokens follow. A character that is not complete is never given."""
        if not self.found:
            self._give(self.stops.finish())
            self.safe += self._undecided
            self._undecided = 0

    def take(self) -> str:
        """The text that may be given and was not taken yet."""
        text = "".join(self.pieces)
        self.pieces.clear()
        return text

    def _give(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self._given += len(text)
        ready = 0
        while ready < len(self._ends) and self._ends[ready] <= self._given:
            ready += 1
        self.safe += ready
        del self._ends[:ready]
