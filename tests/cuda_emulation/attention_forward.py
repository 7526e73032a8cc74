"""Calls of the emulated Hopper forward, and the reference's results of the same calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cuda_emulation.build import Landing, Library
from torch import Tensor

from fastattn import reference
from numerics import assert_within_rule

UNBOUNDED = 1 << 29  # kUnbounded
ELEMENTS = {torch.float16: "half_t", torch.bfloat16: "bfloat16_t"}


@dataclass(frozen=True)
class Case:
    """One call: lengths per sequence if it is packed."""

    name: str
    head_dim: int = 64
    seqlen_q: int | tuple[int, ...] = 200
    seqlen_k: int | tuple[int, ...] = 300
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # of reference.attention
    key_lengths: tuple[int, ...] | None = None
    leftover: int = 0  # tokens behind the last sequence
    blocks: int = 2  # of the persistent grid
    resident: int = 1  # resident at the same time
    fixed_order: bool = False  # of tiles
    clusters: bool = False  # of two blocks, which multicast keys and values

    def __str__(self) -> str:
        return self.name

    @property
    def kernel_dim(self) -> int:
        """The head dim of the kernel that runs the call."""
        return next(dim for dim in (64, 128, 256) if dim >= self.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        """One dtype per kernel, because each instantiation is a build."""
        return torch.float16 if self.kernel_dim == 64 else torch.bfloat16

    @property
    def counted(self) -> bool:
        """Whether tiles are taken from a counter, as in calls whose tiles differ in length."""
        windowed = self.options.get("causal") or self.options.get("window")
        differ = self.packed or self.key_lengths is not None or windowed
        return bool(differ and not self.fixed_order)

    @property
    def packed(self) -> bool:
        return isinstance(self.seqlen_q, tuple)


@dataclass
class Inputs:
    """q, k, v as (B, H, S, D), packed (1, H, T, D), views of (B, S, H, D) memory."""

    query: Tensor
    key: Tensor
    value: Tensor
    ends_q: Tensor | None = None  # cu_seqlens
    ends_k: Tensor | None = None
    key_lengths: Tensor | None = None


def inputs_of(case: Case, spread: float = 1.0) -> Inputs:
    """Random inputs, with NaN in keys and values that no query may see."""
    generator = torch.Generator().manual_seed(1)

    def heads_of(batch: int, rows: int, heads: int, scale: float = 1.0) -> Tensor:
        memory = torch.randn(batch, rows, heads, case.head_dim, generator=generator) * scale
        return memory.to(case.dtype).transpose(1, 2)

    def ends(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    if case.packed:
        assert isinstance(case.seqlen_q, tuple)
        assert isinstance(case.seqlen_k, tuple)
        rows_q, rows_k = sum(case.seqlen_q) + case.leftover, sum(case.seqlen_k) + case.leftover
        inputs = Inputs(
            heads_of(1, rows_q, case.heads, spread),
            heads_of(1, rows_k, case.kv_heads),
            heads_of(1, rows_k, case.kv_heads),
            ends(case.seqlen_q),
            ends(case.seqlen_k),
        )
        inputs.key[:, :, sum(case.seqlen_k) :] = torch.nan
        inputs.value[:, :, sum(case.seqlen_k) :] = torch.nan
        return inputs
    assert isinstance(case.seqlen_q, int)
    assert isinstance(case.seqlen_k, int)
    inputs = Inputs(
        heads_of(case.batch, case.seqlen_q, case.heads, spread),
        heads_of(case.batch, case.seqlen_k, case.kv_heads),
        heads_of(case.batch, case.seqlen_k, case.kv_heads),
    )
    if case.key_lengths is not None:
        inputs.key_lengths = torch.tensor(case.key_lengths, dtype=torch.int32)
        for b, length in enumerate(case.key_lengths):
            inputs.key[b, :, length:] = torch.nan
            inputs.value[b, :, length:] = torch.nan
    return inputs


def run(
    emulated: Callable[..., Library],
    case: Case,
    inputs: Inputs,
    *,
    seed: int = 0,
    landing: Landing = "random",
    starved: int = -1,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the emulated kernel; both are NaN before the launch."""
    out = torch.full_like(inputs.query, torch.nan)
    batch, heads, rows, head_dim = out.shape
    lse = torch.full((batch, heads, rows), torch.nan)
    tensors = (inputs.query, inputs.key, inputs.value, out)
    strides = torch.tensor([tensor.stride()[:3] for tensor in tensors])
    left, right = (UNBOUNDED if side is None else side for side in case.options.get("window") or (None, None))
    causal = case.options.get("causal", False)
    sequences = batch if inputs.ends_q is None else len(inputs.ends_q) - 1
    keys = inputs.key.shape[2]
    sizes = torch.tensor(
        [
            sequences, heads, inputs.key.shape[1], rows, keys, rows, keys, head_dim,
            int(causal == "top_left"), left, 0 if causal else right,
        ]
    )  # fmt: skip
    counter = torch.zeros(1, dtype=torch.int32) if case.counted else None
    library = emulated("attention_fwd.cpp", f"HEAD_DIM={case.kernel_dim}", f"ELEMENT={ELEMENTS[case.dtype]}")
    library(
        "attention_forward", inputs.query, inputs.key, inputs.value, out, lse, strides, sizes, inputs.ends_q,
        inputs.ends_k, inputs.key_lengths, float(case.options.get("scale") or head_dim**-0.5),
        float(case.options.get("softcap") or 0.0), counter, int(case.clusters), case.blocks, seed=seed, landing=landing,
        resident=case.resident, starved=starved,
    )  # fmt: skip
    return out, lse


def wanted(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of the reference in `dtype`."""
    query, key, value = (tensor.to(dtype) for tensor in (inputs.query, inputs.key, inputs.value))
    if inputs.ends_q is None or inputs.ends_k is None:
        return reference.attention(
            query, key, value, key_lengths=inputs.key_lengths, return_lse=True, **case.options
        )
    out = torch.zeros_like(query)
    lse = query.new_full(query.shape[:3], -torch.inf)
    for b in range(len(inputs.ends_q) - 1):
        rows, cols = (slice(int(ends[b]), int(ends[b + 1])) for ends in (inputs.ends_q, inputs.ends_k))
        result = reference.attention(
            query[:, :, rows], key[:, :, cols], value[:, :, cols], return_lse=True, **case.options
        )
        out[:, :, rows], lse[:, :, rows] = result
    return out, lse


def check(
    emulated: Callable[..., Library],
    case: Case,
    *,
    seed: int = 0,
    landing: Landing = "random",
    spread: float = 1.0,
    starved: int = -1,
) -> tuple[Tensor, Tensor]:
    """Assert that the emulated kernel is within the error rule."""
    inputs = inputs_of(case, spread)
    out, lse = run(emulated, case, inputs, seed=seed, landing=landing, starved=starved)
    golden, plain = wanted(case, inputs, torch.float64), wanted(case, inputs, case.dtype)
    assert_within_rule(out, plain[0], golden[0], "out", case.dtype)
    assert_within_rule(lse, plain[1], golden[1], "lse", case.dtype)
    return out, lse
