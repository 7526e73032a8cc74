"""What heads of encoders take: the last hidden states, computed for those tokens alone that a head reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.nn.unpadding import Tokens

LastLayer = Callable[[Tensor, "Tensor | None"], Tensor]


class Encoded:
    """The last hidden states of T tokens, without padding.

    Results of the last layer serve nothing but a token's own output. A head that reads a few tokens asks for these:
    `at`, `first` and `at_and_first` compute the last layer's attention, output and MLP for them alone.

    Args:
        tokens: where the tokens stand.
        x: (T, E), the hidden states; with `last`, those before the last layer.
        last: the last layer. Given x and ascending places (N,) among the T it gives these tokens' hidden states (N, E),
            given None in place of these all of them. None where it ran for all.

    Attributes:
        hidden_states: every layer's, padded, if they were asked for.
        attentions: every layer's, if they were asked for.
    """

    def __init__(
        self,
        tokens: Tokens,
        x: Tensor,
        last: LastLayer | None = None,
        hidden_states: tuple[Tensor, ...] | None = None,
        attentions: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.tokens, self.hidden_states, self.attentions = tokens, hidden_states, attentions
        self._x, self._last = x, last

    @property
    def x(self) -> Tensor:
        """(T, E), of all tokens."""
        if self._last is not None:
            self._x, self._last = self._last(self._x, None), None
        return self._x

    def at(self, rows: Tensor) -> Tensor:
        """(N, E), of the tokens at rows (N,) int64, ascending places among the T; computes the layer in each call."""
        if self._last is not None and 0 < rows.shape[0] < self._x.shape[0]:
            return self._last(self._x, rows)
        return self.x.index_select(0, rows)

    def first(self) -> Tensor:
        """(B, E), of the first token of each sequence; 0 where there is none."""
        if self.tokens.shortest < 1:  # or nothing is known about it
            return self.tokens.first(self.x)
        return self.at(self._firsts())

    def at_and_first(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`at` and `first`, the layer computed once for the tokens of both."""
        if self.tokens.shortest < 1:
            return self.x.index_select(0, rows), self.first()
        firsts = self._firsts()
        both, order = torch.cat((firsts, rows)).sort(stable=True)
        x = self.at(both).index_select(0, order.argsort())
        return x[firsts.shape[0] :], x[: firsts.shape[0]]

    def _firsts(self) -> Tensor:
        return self.tokens.starts(self._x.device)[:-1].long()
