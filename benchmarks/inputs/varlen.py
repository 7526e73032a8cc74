"""Packed sequences to measure, and their random inputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from measure import calls
from report import figures, schema

DROPOUT_SEED = 7  # of our calls


def spread_lengths(shortest: int, longest: int, batch: int, seed: int) -> Tensor:
    """Lengths (batch,) int64 spread evenly from `shortest` to `longest`, in a random order that the seed fixes."""
    spread = torch.linspace(shortest, longest, batch).round().to(torch.int64)
    return spread[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))]


@dataclass(frozen=True)
class VarlenCall:
    """A batch of sequences whose lengths are spread evenly from `shortest` to `longest`, in a fixed random order."""

    name: str
    group: str
    batch: int
    shortest: int
    longest: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    dtype: torch.dtype = torch.float32
    direction: str = "forward+backward"
    target: schema.Result | None = None
    peers: tuple[str, ...] = ()  # () = those of a GPU, and ours by backend
    dropout_p: float = 0.0

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(length) for length in spread_lengths(self.shortest, self.longest, self.batch, seed=7)]

    @property
    def params(self) -> schema.Result:
        """The sizes, and the share of a padded batch that would be tokens."""
        names = ("batch", "shortest", "longest", "heads", "kv_heads", "head_dim", "causal")
        tokens = sum(self.lengths)
        share = round(tokens / (self.batch * max(self.lengths)), 4)
        sizes = {**{name: getattr(self, name) for name in names}, "tokens": tokens, "tokens_of_padded": share}
        return {**sizes, "dropout_p": self.dropout_p} if self.dropout_p else sizes

    @property
    def label(self) -> str:
        """The case in words."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        parts = [f"{self.batch} sequences of {self.shortest}..{self.longest}, {heads}×{self.head_dim}"]  # noqa: RUF001
        parts += ["causal"] if self.causal else []
        parts += [f"dropout {self.dropout_p}"] if self.dropout_p else []
        return ", ".join([*parts, *figures.unusual(self.dtype, self.direction)])

    @property
    def axis(self) -> schema.Result | None:
        """Speed over the longest sequence."""
        line = f"{'causal' if self.causal else 'full'}, {self.direction}, D {self.head_dim}"
        return {"name": "longest sequence", "value": self.longest, "line": line}

    @property
    def flops(self) -> float:
        """2 * (D + Dv) per permitted pair and head; a backward counts 2.5 forwards."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        share = {"forward": 1.0, "forward+backward": 3.5}[self.direction]
        return share * 4.0 * self.head_dim * pairs * self.heads

    @property
    def bytes(self) -> float | None:
        """None: arithmetic bounds it."""
        return None


class VarlenInputs:
    """The packed q, k and v of one case, the same for every provider."""

    def __init__(self, case: VarlenCall, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(7)
        self.tokens, self.longest = sum(case.lengths), max(case.lengths)

        def normal(heads: int) -> Tensor:
            shape = (self.tokens, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(case.dtype)

        tensors = {"dq": normal(case.heads), "dk": normal(case.kv_heads), "dv": normal(case.kv_heads)}
        self.inputs = calls.leaves_of(tensors, case.direction)
        self.dout = normal(case.heads)
        self.starts = list(itertools.accumulate(case.lengths, initial=0))  # and the end of the last
        self.cu_seqlens = torch.tensor(self.starts, dtype=torch.int32, device=device)
