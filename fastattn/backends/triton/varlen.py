"""Packed sequences on the Triton backend: the padded call's kernels, whose programs find their sequence themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastattn.backends.triton.attention import attention_bwd, attention_fwd
from fastattn.spec import AttentionGrads, AttentionSpec, GradsNeeded, VarlenCall

if TYPE_CHECKING:
    from fastattn.kernels.launches import Packing
    from fastattn.kernels.tiles import Tiles


def varlen_fwd(spec: AttentionSpec, call: VarlenCall, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """(out (T, H, Dv), lse (H, T)); tokens of no sequence get 0 and -inf. Never waits for the device."""
    out, lse = attention_fwd(spec, call.as_one_sequence(), tiles, _packing(call))
    return _tokens(out), lse[0]


def varlen_bwd(
    spec: AttentionSpec,
    call: VarlenCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
    tiles: Tiles | None = None,
) -> AttentionGrads:
    """Gradients of (out, lse), bitwise the same on every run."""
    grads = attention_bwd(
        spec, call.as_one_sequence(), _one_sequence(out), lse[None], _one_sequence(dout),
        None if dlse is None else dlse[None], needs, tiles, _packing(call),
    )  # fmt: skip
    query, key, value = (None if t is None else _tokens(t) for t in (grads.query, grads.key, grads.value))
    return grads._replace(query=query, key=key, value=value)


def _packing(call: VarlenCall) -> Packing:
    from fastattn.kernels.launches import Packing

    return Packing(call.cu_seqlens_q, call.cu_seqlens_k)


def _one_sequence(tokens: Tensor) -> Tensor:
    """(T, H, D) as (1, H, T, D)."""
    return tokens.transpose(0, 1)[None]


def _tokens(sequence: Tensor) -> Tensor:
    """(1, H, T, D) as (T, H, D)."""
    return sequence[0].transpose(0, 1)
