"""Keys that no query of their batch entry may see: what they hold, even NaN, reaches no result and no gradient.

Kernels give such keys the weight 0, but 0 * NaN is NaN. They never read keys beyond `key_lengths`. For keys hidden by
a mask, a bias or negative segment ids they get a copy of keys and values with zeros there. On a CPU the torch backend
gets the copy only after a value turned out not to be finite, because finite numbers times 0 are 0. On a GPU that check
would need a synchronisation, so kernels there always get the copy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from fastattn.backends import layout
from fastattn.spec import AttentionCall


def may_hide_keys(call: AttentionCall) -> bool:
    """Whether a call has an option that can hide a key from every query, lengths aside."""
    return call.mask is not None or call.bias is not None or call.key_segments is not None


def looks_first(backend: ModuleType, call: AttentionCall) -> bool:
    """Whether the copy is made only where something is not finite."""
    return backend.NAME == "torch" and call.query.device.type == "cpu"


def all_finite(*tensors: Tensor) -> bool:
    """False if some element is NaN or infinite, which a sum always shows; also False if a sum overflows."""
    return all(math.isfinite(t.sum().item()) for t in tensors)


def hidden_keys(call: AttentionCall) -> Tensor:
    """Which keys no query of their batch entry sees, (1 or B, 1 or Sk) bool: their segment id is negative, their
    column of the mask is False or their column of the bias -inf for all heads and queries."""
    hidden: list[Tensor] = []
    if call.mask is not None:
        hidden.append(~_unexpanded(call.mask).any((1, 2)))
    if call.bias is not None and call.bias.numel():
        hidden.append(_unexpanded(call.bias).amax((1, 2)) == -torch.inf)
    if call.key_segments is not None:
        hidden.append(call.key_segments < 0)
    if not hidden:
        return torch.zeros((1, 1), dtype=torch.bool, device=call.query.device)
    found = hidden[0]
    for other in hidden[1:]:
        found = found | other
    return found


def without_hidden_keys(call: AttentionCall, hidden: Tensor) -> AttentionCall:
    """The call with zeros in hidden keys and their values, and in queries with a negative segment id."""
    of_keys = hidden[:, None, :, None]
    query = call.query
    if call.query_segments is not None:
        query = query.masked_fill((call.query_segments < 0)[:, None, :, None], 0)
    return layout.operands(
        replace(
            call, query=query, key=call.key.masked_fill(of_keys, 0), value=call.value.masked_fill(of_keys, 0)
        )
    )


def zero_hidden(grads: tuple[Tensor | None, ...], hidden: Tensor | None) -> None:
    """Set gradients of keys and values (B, Hkv, Sk, D) to 0 in hidden keys: queries that are NaN reach them too."""
    for grad in grads:
        if grad is not None and hidden is not None:
            grad.masked_fill_(hidden[:, None, :, None], 0)


def cleaned(
    backend: ModuleType, call: AttentionCall, *operands: Tensor
) -> tuple[AttentionCall, Tensor | None]:
    """The call that a kernel may compute, and its hidden keys, or None where no copy was needed.

    operands: tensors whose values at a hidden key or in another row would reach the results if they were not finite.
    """
    if not may_hide_keys(call) or (looks_first(backend, call) and all_finite(*operands)):
        return call, None
    hidden = hidden_keys(call)
    return without_hidden_keys(call, hidden), hidden


def _unexpanded(dense: Tensor) -> Tensor:
    """A 4-D tensor without the repetitions of `expand`."""
    for dim in range(4):
        if dense.shape[dim] > 1 and dense.stride(dim) == 0:
            dense = dense.narrow(dim, 0, 1)
    return dense
