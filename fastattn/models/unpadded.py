"""A decoder's padded batch as one row without padding: its sequences are packed as segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.models.checks import readable
from fastattn.nn.cross_attention import Memory
from fastattn.nn.unpadding import Tokens


@dataclass(frozen=True)
class Row:
    """The real tokens of a batch (B, S) in one row (1, T), in the order of the batch."""

    tokens: Tokens
    memory: Memory | None

    @classmethod
    def of(cls, attention_mask: Tensor | None, targets: Tensor, memory: Memory | None) -> Row | None:
        """The row for a mask and targets, (B, S) both; None without padding, or where a mask may not be read.

        None also where a token of padding has a target, whose loss counts, and where a sequence has padding between its
        tokens, as windows and ALiBi count columns.
        """
        if attention_mask is None or not readable(attention_mask):
            return None
        tokens = Tokens.of(attention_mask, *attention_mask.shape, gaps=False)
        if tokens.places is None or tokens.real is None or not len(tokens.places):
            return None
        if bool((targets[~tokens.real] != IGNORE_INDEX).any()):
            return None
        if memory is None:
            return cls(tokens, None)
        has_padding = memory.tokens.real is not None and memory.tokens.places is None
        return None if has_padding else cls(tokens, replace(memory, readers=tokens))

    def run(
        self,
        forward: Callable[..., Any],
        input_ids: Tensor,
        targets: Tensor,
        position_ids: Tensor,
        output_hidden_states: bool,
    ) -> Any:
        """What `GPT.forward` gives without logits for (B, S) inputs; position_ids may be (S,)."""
        tokens = self.tokens
        assert tokens.places is not None

        def packed(x: Tensor) -> Tensor:
            return tokens.pack(x)[None]

        output = forward(
            packed(input_ids),
            labels=packed(targets),
            labels_aligned=True,
            position_ids=packed(position_ids.expand(input_ids.shape)),
            segment_ids=(tokens.places // tokens.seqlen)[None],
            memory=self.memory,
            return_logits=False,
            output_hidden_states=output_hidden_states,
        )
        hidden = output.hidden_states
        return output._replace(
            last_hidden_state=tokens.pad(output.last_hidden_state[0]),
            hidden_states=None if hidden is None else tuple(tokens.pad(h[0]) for h in hidden),
        )
