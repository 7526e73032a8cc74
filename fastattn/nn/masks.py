"""The inputs of torch.nn.MultiheadAttention checked, and its masks turned into the op's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import arguments


class MaskError(ValueError, RuntimeError):
    """A mask that does not fit; torch raises RuntimeError here."""


class ShapeError(ValueError, AssertionError):
    """A tensor of the wrong shape or dtype; torch raises AssertionError here."""


class Masks(NamedTuple):
    """attn_mask and key_padding_mask as `attention` takes them, both 4-D."""

    mask: Tensor | None = None  # bool, True = attend
    bias: Tensor | None = None  # added to the scores

    def padded(self, extra_keys: int) -> Masks:
        """The same for `extra_keys` more keys at the end, which every query sees."""
        mask = None if self.mask is None else F.pad(self.mask, (0, extra_keys), value=True)
        bias = None if self.bias is None else F.pad(self.bias, (0, extra_keys))
        return Masks(mask, bias)


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, *, widths: tuple[int, int, int], batch_first: bool
) -> bool:
    """Whether the input is batched; raises ShapeError for what does not fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.check_tensor(name, tensor)
    if query.dim() not in (2, 3):
        raise ShapeError(f"query: got {query.dim()} dimensions, needs 3, or 2 for unbatched input")
    batched = query.dim() == 3
    for name, tensor, width in zip(("query", "key", "value"), (query, key, value), widths):
        if tensor.dim() != query.dim():
            raise ShapeError(f"{name}: got {tensor.dim()} dimensions, needs the query's {query.dim()}")
        if tensor.shape[-1] != width:
            raise ShapeError(f"{name}: got {tensor.shape[-1]} features, needs {width}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ShapeError(
            f"value: got shape {tuple(value.shape)}, needs the key's {tuple(key.shape[:-1])} before its features"
        )
    batch_dim = 0 if batch_first else 1
    if batched and query.shape[batch_dim] != key.shape[batch_dim]:
        raise ShapeError(
            f"key: got batch size {key.shape[batch_dim]}, needs the query's {query.shape[batch_dim]}"
        )
    return batched


def merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    batched: bool,
) -> Masks:
    """Invert bool masks to True = attend and bring all to 4-D; only two masks of one kind are combined.

    attn_mask is (Sq, Sk) or (B * H, Sq, Sk); key_padding_mask (B, Sk), or (Sk,) for unbatched input.
    """
    keep: list[Tensor] = []
    added: list[Tensor] = []
    if attn_mask is not None:
        _check_kind("attn_mask", attn_mask)
        full = (batch * num_heads, seqlen_q, seqlen_k)
        if tuple(attn_mask.shape) not in (full, full[1:]):
            raise _shape_error(attn_mask)(
                f"attn_mask: got shape {tuple(attn_mask.shape)}, needs {full[1:]}, or {full} for one per head"
            )
        by_head = (
            attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, num_heads))
        )
        (keep if attn_mask.dtype == torch.bool else added).append(by_head)  # (1 or B, 1 or H, Sq, Sk)
    if key_padding_mask is not None:
        _check_kind("key_padding_mask", key_padding_mask)
        needs = (batch, seqlen_k) if batched else (seqlen_k,)
        if tuple(key_padding_mask.shape) != needs:
            raise ShapeError(f"key_padding_mask: got shape {tuple(key_padding_mask.shape)}, needs {needs}")
        by_key = key_padding_mask.view(batch, 1, 1, seqlen_k)
        (keep if key_padding_mask.dtype == torch.bool else added).append(by_key)
    hidden = None if not keep else keep[0] if len(keep) == 1 else keep[0] | keep[1]
    bias = None if not added else added[0] if len(added) == 1 else added[0] + added[1]
    return Masks(None if hidden is None else ~hidden, bias)


def _check_kind(name: str, mask: Tensor) -> None:
    arguments.check_tensor(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ShapeError(f"{name}: got {mask.dtype}, needs bool (True = do not attend) or a float dtype")


def _shape_error(mask: Tensor) -> type[ValueError]:
    """torch objects to a mask's rank by an AssertionError and to its sizes by a RuntimeError."""
    return MaskError if mask.dim() in (2, 3) else ShapeError
