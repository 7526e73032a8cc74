"""The text of a continuation as it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.generation.protocol import Decodes
from fastattn.generation.stopping import StopStrings

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what tokenizers give for bytes that are no character, or not yet one
CONTEXT = 8  # tokens of the prompt that are decoded with the continuation, for spaces at its beginning
UNFINISHED = 3  # most of these that a character not yet complete is shown as: it has four bytes


class Detokenizer:
    """Text of tokens that come one by one.

    A token's text may depend on the tokens before it, a character may span several tokens, and a token may end one
    character and begin the next. So pending tokens are decoded together with the tokens whose text was given last, and
    what of this was not given yet is given, but for unknown characters at its end.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.before = list(prompt[-CONTEXT:])  # tokens whose text was given
        self.pending: list[int] = []  # tokens after them, the last of which may end within a character
        self.waiting = 0  # unknown characters at the end, which were not given
        self._given = self._decode(self.before)  # of the text of both

    def push(self, token: int) -> str:
        """The text that this token completes, often empty within a character."""
        self.pending.append(token)
        whole = self._whole()
        self.waiting = min(_unknown_at_end(whole), UNFINISHED)
        end = max(len(whole) - self.waiting, len(self._given))
        text = whole[len(self._given) : end]
        if self.waiting:
            self._given = whole[:end]
            if len(self.pending) > 2 * CONTEXT:
                self._shorten(whole[end:])
            return text
        # special tokens give no text, and so cannot stand in for what is before a token
        self.before = self.pending if text else (self.before + self.pending)[-2 * CONTEXT :]
        self.pending, self._given = [], self._decode(self.before)
        return text

    def _whole(self) -> str:
        """The text of the tokens before and the pending ones, which begins with what was given."""
        whole = self._decode(self.before + self.pending)
        if whole.startswith(self._given):
            return whole
        # the prompt ended within a character that is complete now
        complete = self._given[: len(self._given) - min(_unknown_at_end(self._given), UNFINISHED)]
        if complete != self._given and whole.startswith(complete):
            self._given = complete
            return whole
        # decoders of single bytes show none of the characters of neighbouring bytes until all of them are complete
        self.before, self._given = [], ""
        return self._decode(self.pending)

    def _shorten(self, held: str) -> None:
        """Forget the first tokens where many end within a character, so that decoding them again stays cheap."""
        last = self.pending[-CONTEXT:]
        text = self._decode(last)
        if text.endswith(held):
            self.before, self.pending, self._given = [], last, text[: len(text) - len(held)]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _unknown_at_end(text: str) -> int:
    return len(text) - len(text.rstrip(UNKNOWN))


class RowText:
    """The text of a row's continuation, and which of its tokens may be given with it.

    A token may be returned once all its characters may. A token with a character of a stop string never is.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int], stop_strings: Sequence[str]) -> None:
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self.stops = StopStrings(stop_strings)
        self.pieces: list[str] = []  # not taken yet
        self.safe = 0  # tokens that may be given
        self._ends: list[int] = []  # for each token after those, where the last of its characters ends
        self._decoded = self._given = 0  # characters

    @property
    def found(self) -> bool:
        """Whether a stop string is complete."""
        return self.stops.found

    def push(self, token: int) -> None:
        """A token joined the row."""
        text = self.detokenizer.push(token)
        self._decoded += len(text)
        end = self._decoded + self.detokenizer.waiting
        # bytes of one character are several unknown ones until it is complete, so that an end may move to the left
        self._ends = [*(min(each, end) for each in self._ends), end]
        self._give(self.stops.push(text))

    def finish(self) -> None:
        """No more tokens follow. A character that is not complete is never given."""
        if not self.found:
            self._give(self.stops.finish())
            self.safe += len(self._ends)
            self._ends.clear()

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
