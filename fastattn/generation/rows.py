"""The generated tokens, kept on the host: which rows are finished, and which tokens may be returned already."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.generation.choosing import NOT_FINITE, refuse_not_finite
from fastattn.generation.options import Settled
from fastattn.generation.protocol import CausalLM
from fastattn.generation.stopping import special_tokens
from fastattn.generation.text import RowText


class Row:
    """The continuation of one prompt."""

    def __init__(self, ends: frozenset[int], limit: int, text: RowText | None) -> None:
        self.ids: list[int] = []
        self.done = limit == 0
        self.ends, self.limit, self.text = ends, limit, text

    def append(self, token: int) -> None:
        """Append a chosen token; if it completes a stop string, the tokens of the string are removed."""
        if token == NOT_FINITE:
            refuse_not_finite(len(self.ids))
        self.ids.append(token)
        self.done = token in self.ends or len(self.ids) == self.limit
        if self.text is None:
            return
        self.text.push(token)
        if self.text.found:
            self.done = True
            del self.ids[self.text.safe :]
        elif self.done:
            self.text.finish()

    @property
    def given(self) -> int:
        """How many of the first tokens cannot belong to a stop string."""
        if self.text is None or not self.text.stops.strings:
            return len(self.ids)
        return self.text.safe


class Rows:
    """The continuations of a batch."""

    def __init__(
        self, model: CausalLM, prompt: Tensor, mask: Tensor | None, options: Settled, with_text: bool = False
    ) -> None:
        """prompt: (R, S), a row for each continuation; with_text: make the text, also without stop strings."""
        by_text = bool(options.stop_strings)
        self.ends, self.pad = special_tokens(
            model, options.eos_token_id, options.pad_token_id, by_text, options.stop_ids,
            several=len(prompt) > 1,
        )  # fmt: skip
        texts: list[RowText | None] = [None] * len(prompt)
        if by_text or with_text:
            assert options.tokenizer is not None
            made = [
                RowText(options.tokenizer, row, options.stop_strings) for row in real_tokens(prompt, mask)
            ]
            texts = list(made)
        self.rows = [Row(frozenset(self.ends), options.max_new_tokens, text) for text in texts]
        self.room = options.max_new_tokens
        self.unfinished = torch.tensor([not row.done for row in self.rows], device=prompt.device)

    @property
    def finished(self) -> bool:
        """Whether no row needs a token."""
        return all(row.done for row in self.rows)

    def append(self, tokens: Tensor) -> Tensor:
        """Append chosen tokens (R,); returns them with padding in finished rows."""
        ended = False
        padded = any(row.done for row in self.rows)
        for row, token in zip(self.rows, tokens.tolist()):
            if not row.done:
                row.append(token)
                ended |= row.done
        if padded:
            tokens = torch.where(self.unfinished, tokens, self.pad)
        if ended:
            self.unfinished = torch.tensor([not row.done for row in self.rows], device=tokens.device)
        return tokens

    def tensor(self, like: Tensor) -> Tensor:
        """The continuations (R, longest), padded on the right; (0, max_new_tokens) if there are no rows."""
        longest = max((len(row.ids) for row in self.rows), default=self.room)
        ids = [row.ids + [self.pad] * (longest - len(row.ids)) for row in self.rows]
        return torch.tensor(ids, dtype=like.dtype, device=like.device).view(len(self.rows), longest)


def real_tokens(prompt: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The ids of each row of (R, S) without padding."""
    rows: list[list[int]] = prompt.tolist()
    if mask is None:
        return rows
    return [[token for token, real in zip(*pair) if real] for pair in zip(rows, mask.tolist())]
