"""Tokens as texts: the string of each, its bytes, and where it begins in a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastattn.data import Tokenizer
from fastattn.generation.text import UNKNOWN, Detokenizer
from fastattn.serve.engine import TokenScore

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


_BYTES = _byte_characters()


class TokenStrings:
    """The strings of a tokenizer's tokens, each looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._made: dict[int, tuple[str, bytes]] = {}

    def string(self, token: int) -> str:
        """A token's text; of one that ends within a character "bytes:" and its bytes, as \\xe2."""
        return self._look_up(token)[0]

    def bytes_of(self, token: int) -> list[int]:
        """A token's bytes in UTF-8."""
        return list(self._look_up(token)[1])

    def _look_up(self, token: int) -> tuple[str, bytes]:
        if token not in self._made:
            self._made[token] = self._make(token)
        return self._made[token]

    def _make(self, token: int) -> tuple[str, bytes]:
        core = self.tokenizer.core
        spelled = core.id_to_token(token)
        if spelled is None:  # an id beyond the tokenizer's, which models may have for their size
            return "", b""
        # behind itself, as some decoders take the space off a text's first token
        one, two = (core.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        text = two[len(one) :] if two.startswith(one) else one
        if UNKNOWN not in text:
            return text, text.encode("utf-8", "replace")
        if match := _BYTE.fullmatch(spelled):
            raw = bytes([int(match[1], 16)])
        elif all(character in _BYTES for character in spelled):
            raw = bytes(_BYTES[character] for character in spelled)
        else:
            return text, text.encode("utf-8", "replace")
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class LegacyLogprobs:
    """The logprobs of /v1/completions: four lists with an entry for each token.

    text_offset counts characters from the beginning of the prompt. A token within a character has the offset of the
    text after it that is complete.
    """

    def __init__(self, strings: TokenStrings, prompt: Sequence[int], prompt_text: str, echo: bool) -> None:
        self.strings = strings
        self.detokenizer = Detokenizer(strings.tokenizer, [] if echo else prompt)
        self.offset = 0 if echo else len(prompt_text)

    def of(self, scores: Sequence[TokenScore], top: int) -> dict[str, list[Any]]:
        """The object of further tokens."""
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for score in scores:
            name = self.strings.string(score.token)
            found["tokens"].append(name)
            found["token_logprobs"].append(score.logprob)
            found["text_offset"].append(self.offset)
            best: dict[str, float] | None = None
            if score.logprob is not None:
                best = {}
                for token, logprob in score.top[:top]:
                    best.setdefault(self.strings.string(token), logprob)
                best.setdefault(name, score.logprob)
            found["top_logprobs"].append(best)
            self.offset += len(self.detokenizer.push(score.token))
        return found


def chat_logprobs(strings: TokenStrings, scores: Sequence[TokenScore], top: int) -> dict[str, Any]:
    """The logprobs of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": strings.string(token), "logprob": logprob, "bytes": strings.bytes_of(token)}

    content = [
        {**entry(s.token, s.logprob), "top_logprobs": [entry(t, p) for t, p in s.top[:top]]} for s in scores
    ]
    return {"content": content, "refusal": None}
