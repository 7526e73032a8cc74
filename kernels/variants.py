"""What a compiled attention kernel depends on: the mapping from a spec's features to it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastattn.kernels.tiles import Tile
from fastattn.spec import AttentionSpec


class AttentionVariant(NamedTuple):
    """Everything a compiled attention kernel depends on beside its tile: one value is one set of binaries."""

    head_dim: int
    value_dim: int
    group_size: int = 1
    has_left: bool = False  # the window bounds keys before a query's position
    has_right: bool = False  # and after it; causal is right = 0
    varlen: bool = False  # sequences lie packed one after another
    key_lengths: bool = False
    mask: bool = False
    bias: bool = False
    segments: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    dweights: bool = False  # backward of the weights rather than of the output
    alibi_grad: bool = False
    bias_one_row: bool = False  # the bias whose gradient is computed is broadcast over queries
    bias_one_col: bool = False  # or keys
    unit_mask: bool = False  # neighbouring columns are neighbours in memory
    unit_bias: bool = False
    unit_dweights: bool = False
    fold_scale: bool = False  # q.k is scaled within the exponent: `folds_scale`
    dot_precision: str = "ieee"  # of float32 products: "ieee", "tf32x3" or "tf32"
    unit: int = 1  # elements that strides count: 16 bytes where everything is aligned, else one
    int64_offsets: bool = False  # offsets within a tile need 64 bits

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        tile: Tile,
        unit: int,
        *,
        fold_scale: bool,
        sinks: bool,
        int64_offsets: bool,
        varlen: bool = False,
        unit_mask: bool = False,
        unit_bias: bool = False,
    ) -> AttentionVariant:
        """The variant of a kernel that scores queries against keys: the features of the spec, and the layout.

        Args:
            fold_scale: `folds_scale`, which forward and backward have to agree on.
            sinks: whether this kernel adds the sinks.
        """
        exact = spec.float32_precision == "ieee"
        return cls(
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            group_size=spec.group_size,
            has_left=spec.window_left,
            has_right=spec.window_right or spec.causal != "none",
            varlen=varlen,
            key_lengths=spec.key_lengths,
            mask=spec.mask,
            bias=spec.bias,
            segments=spec.segments,
            alibi=spec.alibi,
            softcap=spec.softcap,
            sinks=sinks,
            dropout=spec.dropout,
            unit_mask=unit_mask,
            unit_bias=unit_bias,
            fold_scale=fold_scale,
            dot_precision="tf32x3" if tile.tf32x3 and exact else spec.float32_precision,
            unit=unit,
            int64_offsets=int64_offsets,
        )


def folds_scale(spec: AttentionSpec, scale: float, sinks: bool) -> bool:
    """Whether q.k is scaled within the exponent.

    It is not for float32, for a scale that is not positive, with sinks, and where softcap, ALiBi or a bias follow the
    scale.
    """
    changed = spec.softcap or spec.alibi or spec.bias or sinks
    return scale > 0.0 and spec.dtype != torch.float32 and not changed
