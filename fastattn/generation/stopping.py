"""The tokens and the strings that end a row, and the padding after the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.generation.protocol import CausalLM, Decodes
from fastattn.ops.arguments import is_integer

NONE = (None, -1)  # how files say that there is no such token


def special_tokens(
    model: CausalLM,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    by_text: bool = False,
    stop_ids: Sequence[int] = (),
    *,
    several: bool = False,
) -> tuple[list[int], int]:
    """End tokens and the padding token.

    Ids that are None are taken from the model's generation_config, else from its config. Given ids must be in the
    vocabulary. Configs may name ids beyond it, as small models with GPT-2's defaults do: such an end token is ignored,
    and such a padding token is refused if a row could need it.

    Args:
        by_text: rows may end at a string.
        stop_ids: further tokens that end a row; those beyond the vocabulary are ignored.
        several: there is more than one row, so that one that ends early is padded.
    """
    size, config_pad = model.config.vocab_size, _default(model, "pad_token_id")
    if eos_token_id is None:
        named = _default(model, "eos_token_id")
        ids = [] if named is None else [named] if isinstance(named, int) else list(named)
        ends = [token for token in ids if token < size]
    elif is_integer(eos_token_id):
        ends = [_token_id("eos_token_id", eos_token_id, size)]
    else:
        given = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
        given = [given] if is_integer(given) else given  # a tensor without dimensions
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise TypeError(f"eos_token_id: got {eos_token_id!r}, needs a token id or a sequence of them")
        ends = [_token_id("eos_token_id", token, size) for token in given]
    if pad_token_id is not None:
        pad = _token_id("pad_token_id", pad_token_id, size)
    elif config_pad is not None and several and (ends or by_text):
        pad = _token_id("pad_token_id of the config", config_pad, size)
    elif several and by_text and not ends:
        raise ValueError(
            "pad_token_id: got None, and the config has none; rows that end at a string need one"
        )
    else:
        pad = ends[0] if ends else 0  # no row needs it: without an end token none is finished early
    return [*ends, *(token for token in stop_ids if token < size and token not in ends)], pad


def _default(model: CausalLM, name: str) -> Any:
    found: Any = (getattr(model, "generation_config", None) or {}).get(name)
    several = isinstance(found, (list, tuple)) and name == "eos_token_id"
    if several:
        found = [token for token in found if token not in NONE]
    if not several and found in NONE:
        return getattr(model.config, name)
    if not all(map(is_integer, found if several else [found])):
        raise ValueError(f"generation_config: {name}: got {found!r}, needs a token id")
    return found


def _token_id(name: str, token: object, size: int) -> int:
    if isinstance(token, Tensor) and token.dim() == 0:
        token = token.item()
    if not is_integer(token):
        raise TypeError(f"{name}: got {token!r}, needs a token id, an integer")
    number = int(token)  # type: ignore[call-overload]
    if not 0 <= number < size:
        raise ValueError(f"{name}: got {number}, needs 0 to {size - 1} (vocab_size - 1)")
    return int(number)


def stop_tokens(tokenizer: Decodes, strings: Sequence[str]) -> tuple[int, ...]:
    """The ids of the stop strings that are special tokens, which the decoded text does not show.

    Raises:
        ValueError: a string holds a special token among other text.
    """
    special = _special_texts(tokenizer)
    for string in strings:
        held = [text for text in special if text in string]
        if held and string not in special:
            raise ValueError(
                f"stop_strings: got {string!r}, which holds the special token {max(held, key=len)!r}; needs it alone"
            )
    return tuple(special[string] for string in strings if string in special)


def _special_texts(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer of transformers, tokenizers or `fastattn.data` as text -> id."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None:
        core = getattr(tokenizer, "core", tokenizer)
        added = core.get_added_tokens_decoder() if hasattr(core, "get_added_tokens_decoder") else {}
    return {token.content: number for number, token in added.items() if token.special and token.content}


class StopStrings:
    """Passes on text that arrives in pieces, up to the first stop string.

    The first is the one that ends first; of those that end together, the longest. So the cut does not depend on the
    pieces. Characters that may begin a stop string are held back until that is decided.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(sorted(strings, key=len, reverse=True))
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be passed on after these characters; sets `found` if a stop string is complete."""
        if self.found or not text:
            return ""
        start = len(self.held)
        whole = self.held + text
        for end in range(start + 1, len(whole) + 1):
            for string in self.strings:
                if whole.endswith(string, 0, end):
                    self.found, self.held = True, ""
                    return whole[: end - len(string)]
        kept = next(
            (n for n in range(min(len(whole), self._longest() - 1), 0, -1) if self._begins(whole[-n:])), 0
        )
        self.held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]

    def finish(self) -> str:
        """The text held back so far, once no more follows."""
        text, self.held = self.held, ""
        return text

    def _longest(self) -> int:
        return len(self.strings[0]) if self.strings else 1

    def _begins(self, text: str) -> bool:
        return any(string.startswith(text) for string in self.strings)
