"""Padded batches computed without padding: tokens are packed, attend within their sequence and are padded back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.attention import attention
from fastattn.ops.varlen import attention_varlen

Window = tuple[int, int]


def tokens_at_a_time(device: torch.device) -> int:
    """How many tokens of many texts an encoder reads at a time: on a CPU their activations should fit its caches."""
    return 2048 if device.type == "cpu" else 8192


@dataclass
class Tokens:
    """The positions of the T tokens of a batch (B, S); `Tokens.of` makes it from a mask.

    It has one of three forms:
        dense: no padding, T = B * S.
        packed: T is the number of real tokens, in the order of the batch; nothing is computed for padding.
        masked: T = B * S including padding, which is hidden from attention. For programs that are recorded before the
            mask is known, where T must not depend on values: torch.compile, export, captured CUDA graphs.
    """

    batch: int
    seqlen: int
    real: Tensor | None = None  # (B, S) bool; None where all tokens are real
    places: Tensor | None = None  # (T,) int64, places among B * S of packed tokens, ascending
    cu_seqlens: Tensor | None = None  # (B + 1,) int32, where each sequence of packed tokens starts
    longest: int = 0  # tokens of the longest sequence
    shortest: int = 0  # and of the shortest; 0 where the mask's values are not read

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, seqlen: int, *, gaps: bool = True) -> Tokens:
        """The form for a mask (B, S), nonzero = a real token, or None without padding.

        gaps: whether a sequence's tokens may have padding between them; if not, a mask with such gaps stays masked, as
            windows count columns.
        """
        if mask is None:
            return cls(batch, seqlen, longest=seqlen, shortest=seqlen)
        real = mask if mask.dtype == torch.bool else mask != 0
        if not _may_read(real):
            return cls(batch, seqlen, real, longest=seqlen)
        places = real.flatten().nonzero().squeeze(1)  # on a GPU this waits for the mask
        if places.shape[0] == batch * seqlen:
            return cls(batch, seqlen, longest=seqlen, shortest=seqlen)
        if not gaps and seqlen > 1 and bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
            return cls(batch, seqlen, real, longest=seqlen)
        lengths = real.sum(1, dtype=torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        shortest, longest = torch.stack(lengths.aminmax()).tolist() if batch else (0, 0)
        return cls(batch, seqlen, real, places, cu_seqlens, longest, shortest)

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...)."""
        rows = x.reshape(self.batch * self.seqlen, *x.shape[2:])
        return rows if self.places is None else rows.index_select(0, self.places)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(T, ...) -> (B, S, ...), `value` at padding."""
        if self.places is not None:
            rows = x.new_full((self.batch * self.seqlen, *x.shape[1:]), value)
            x = rows.index_copy(0, self.places, x)
        padded = x.view(self.batch, self.seqlen, *x.shape[1:])
        if self.real is not None and self.places is None:
            padded = padded.masked_fill(~self.real.view(*self.real.shape, *(1,) * (x.dim() - 1)), value)
        return padded

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: Window | None = None,
        weights: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every token to its sequence's tokens: (T, H, D) thrice -> (T, H, D).

        weights: also return the attention weights (B, H, S, S), 0 in the rows and columns of padding.
        options: those of `attention` that `attention_varlen` has as well.
        """
        if self.cu_seqlens is not None and not weights:
            packing = (self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)
            return cast(Tensor, attention_varlen(q, k, v, *packing, window=window, **options)), None
        q, k, v = (self.pad(x).transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
        ids = None if self.real is None else self.real.to(torch.int32) - 1  # 0 for a token, -1 for padding
        out = attention(q, k, v, window=window, segment_ids=ids, return_weights=weights, **options)
        out, shown = out if isinstance(out, tuple) else (out, None)
        return self.pack(out.transpose(1, 2)), shown

    def attend_from(self, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of some tokens to all of their sequence, without padding: (N, H, D), (T, H, D) twice -> (N, H, D).

        rows: (N,) integers, ascending, where the tokens of q stand among the T.
        """
        starts = self.starts(q.device)
        of_rows = torch.searchsorted(rows, starts, out_int32=True)  # (B + 1,)
        # reading the most rows of a sequence would wait for a GPU, whose kernels need a bound only
        most = int(of_rows.diff().max()) if q.device.type == "cpu" else self.longest
        return cast(Tensor, attention_varlen(q, k, v, of_rows, starts, most, self.longest, **options))

    def first(self, x: Tensor) -> Tensor:
        """The first token of every sequence, (T, E) -> (B, E); 0 where there is none."""
        if self.cu_seqlens is not None:
            if x.shape[0] == 0:
                return x.new_zeros(self.batch, x.shape[1])
            starts = self.cu_seqlens[:-1].clamp(max=x.shape[0] - 1)
            rows = x.index_select(0, starts)
            return rows.masked_fill(self.lengths(x.device)[:, None] == 0, 0)
        if self.seqlen == 0:
            return x.new_zeros(self.batch, x.shape[-1])
        padded = x.view(self.batch, self.seqlen, x.shape[-1])
        if self.real is None:
            return padded[:, 0]
        at = self.real.to(torch.uint8).argmax(1)[:, None, None].expand(-1, 1, x.shape[-1])
        return padded.gather(1, at).squeeze(1).masked_fill(self.lengths(x.device)[:, None] == 0, 0)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over every sequence's tokens, (T, E) -> (B, E); 0 where there is none."""
        return self.sum(x) / self.lengths(x.device).clamp(min=1)[:, None].to(x.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over every sequence's tokens, (T, E) -> (B, E)."""
        return self._reduced(x, "sum", 0.0)

    def max(self, x: Tensor) -> Tensor:
        """The largest value of every sequence's tokens, (T, E) -> (B, E); 0 where there is none."""
        largest = self._reduced(x, "max", -torch.inf)
        return largest.masked_fill(self.lengths(x.device)[:, None] == 0, 0)

    def _reduced(self, x: Tensor, how: str, empty: float) -> Tensor:
        if self.seqlen == 0:
            return x.new_full((self.batch, x.shape[-1]), empty)
        if self.cu_seqlens is not None:
            return torch.segment_reduce(x, how, offsets=self.cu_seqlens.long(), initial=empty)
        padded = self.pad(x, empty)
        return padded.sum(1) if how == "sum" else padded.amax(1)

    def starts(self, device: torch.device) -> Tensor:
        """(B + 1,) int32, where each sequence starts among packed or dense tokens, and where the last one ends."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        return torch.arange(self.batch + 1, dtype=torch.int32, device=device) * self.seqlen

    def lengths(self, device: torch.device) -> Tensor:
        """(B,) int64, the number of tokens of each sequence, on `device`."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        if self.real is not None:
            return self.real.sum(1)
        return torch.full((self.batch,), self.seqlen, device=device)


def _may_read(tensor: Tensor) -> bool:
    """Whether code may depend on the mask's values here."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or type(tensor) is not Tensor
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
