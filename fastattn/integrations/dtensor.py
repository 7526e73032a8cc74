"""Attention of DTensors: `register()` once, then `fastattn.attention` works on operands split over batch or heads.

torch's interface for it, torch.distributed.tensor.experimental.register_sharding, is experimental; only this file uses
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.ops import attention as _ops  # noqa: F401  # defines the ops
from fastattn.ops.attention_plan import NAMES
from fastattn.spec import GradsNeeded

BATCH, HEADS = 0, 1  # dimensions of (B, H, S, D)
Placements = list[Any]
_registered = False


def register() -> None:
    """Tell DTensor how the attention ops are split.

    Query, key and value (B, H, S, D) split over batch, or over heads where the key/value heads divide by the number of
    processes, are attended to where they are, forward and backward, and so is what has a row for each batch entry or
    head: masks, biases, segment ids, key lengths, slopes and sinks. Gradients of what all processes share are sums over
    them. Operands split in another way, and those with dropout, whose mask goes by the place in the whole batch, are
    gathered first. Calling it again changes nothing.

    Raises:
        ImportError: this torch has no register_sharding.
    """
    global _registered
    from torch.distributed.tensor.experimental import register_sharding

    if _registered:
        return
    register_sharding(torch.ops.fastattn.attention_fwd.default)(_forward)
    register_sharding(torch.ops.fastattn.attention_bwd.default)(_backward)
    _registered = True


def _forward(*args: Any) -> list[tuple[Placements, Placements]]:
    """The ways to split attention_fwd: placements of (out, lse), and of every argument."""
    from torch.distributed.tensor import Replicate, Shard

    found: list[tuple[Placements, Placements]] = [
        ([Replicate()] * 2, [_replicated(arg) for arg in args]),
    ]
    call = dict(zip(NAMES, args))
    for dim in _dims(call):
        found.append(([Shard(dim)] * 2, [*_inputs(call, dim), *[None] * (len(args) - len(NAMES))]))
    return found


def _backward(*args: Any) -> list[tuple[Placements, Placements]]:
    """The ways to split attention_bwd: placements of the gradients, and of every argument."""
    from torch.distributed.tensor import Replicate, Shard

    _, dlse, _, _, *inputs = args  # dout, dlse, out, lse
    call = dict(zip(NAMES, inputs))
    needs = inputs[len(NAMES)]
    grads = len(GradsNeeded._fields)
    found: list[tuple[Placements, Placements]] = [
        ([Replicate()] * grads, [_replicated(arg) for arg in args]),
    ]
    for dim in _dims(call):
        lead = [Shard(dim), None if dlse is None else Shard(dim), Shard(dim), Shard(dim)]
        rest = [None] * (len(inputs) - len(NAMES))
        outputs = [_gradient(call, name, dim, need) for name, need in zip(GradsNeeded._fields, needs)]
        found.append((outputs, [*lead, *_inputs(call, dim), *rest]))
    return found


def _dims(call: dict[str, Any]) -> Sequence[int]:
    """The dimensions that a call can be split over."""
    if call["dropout_p"]:
        return ()
    divides = all(call[name].shape[HEADS] % call["key"].mesh.size() == 0 for name in ("query", "key"))
    return (BATCH, HEADS) if divides else (BATCH,)


def _inputs(call: dict[str, Any], dim: int) -> Placements:
    return [_placement(name, call[name], dim) for name in NAMES]


def _placement(name: str, arg: Any, dim: int) -> Any:
    """The placement of an argument of a call that is split over `dim`; None for arguments that are not tensors."""
    from torch.distributed.tensor import Replicate, Shard

    if not _is_tensor(arg):
        return None
    own = _dimension(name, len(arg.shape), dim)
    return Replicate() if own is None or arg.shape[own] == 1 else Shard(own)


def _dimension(name: str, rank: int, dim: int) -> int | None:
    """The dimension of an argument that goes with `dim` of the query."""
    if name in ("query_segments", "key_segments", "key_lengths"):  # (B, S), (B,)
        return 0 if dim == BATCH else None
    if name in ("alibi_slopes", "sinks"):  # (H,) or (B, H)
        return rank - 1 if dim == HEADS else (0 if rank == 2 else None)
    return None if name == "dropout_seed" else dim


def _gradient(call: dict[str, Any], name: str, dim: int, need: bool) -> Any:
    """The placement of a gradient; the sum over processes of one whose argument all of them have whole."""
    from torch.distributed.tensor import Partial, Replicate

    if not need:
        return Replicate()  # an empty tensor
    placement = _placement(name, call[name], dim)
    return Partial() if placement == Replicate() else placement


def _replicated(arg: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate() if _is_tensor(arg) else None


def _is_tensor(arg: Any) -> bool:
    return hasattr(arg, "tensor_meta")
