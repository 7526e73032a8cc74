"""The options of the attention calls as typed dicts, which the overloads of each call share."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class SharedOptions(TypedDict, total=False):
    """Options of every attention call."""

    causal: bool | str
    window: tuple[int | None, int | None] | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    scale: float | None
    backend: str


class VarlenOptions(SharedOptions, total=False):
    """Options of packed sequences."""

    dropout_p: float
    dropout_seed: int | Tensor | None


class AttentionOptions(VarlenOptions, total=False):
    """Options of a padded batch."""

    mask: Tensor | None
    bias: Tensor | None
    segment_ids: Tensor | tuple[Tensor, Tensor] | None
    key_lengths: Tensor | None


class KVCacheOptions(SharedOptions, total=False):
    """Options of a call against a key/value cache."""

    key: Tensor | None
    value: Tensor | None
    block_table: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    num_splits: int | None
