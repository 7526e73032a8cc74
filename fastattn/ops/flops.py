"""The FLOP formulas of the ops, given to torch's FLOP counter when that is first imported.

Importing the counter loads triton where it is installed: `import fastattn` after torch would take 277 ms instead of
118 ms (medians of 15 processes, torch 2.13 on a CPU), so the formulas are registered when other code imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fastattn import torch_compat

COUNTER = "torch.utils.flop_counter"


def forward_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """2 * (D + Dv) per pair of a query and a key, masked or not, as torch counts its own attention."""
    batch, num_heads, seqlen_q, head_dim = query
    return 2 * batch * num_heads * seqlen_q * key[2] * (head_dim + value[3])


def backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    """2.5 times the forward: the products with the scores recomputed once, as torch counts its own."""
    batch, num_heads, seqlen_q, head_dim = query
    return batch * num_heads * seqlen_q * key[2] * (6 * head_dim + 4 * value[3])


def weights_flops(lse: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """2 * D per pair of a query and a key: the scores once more."""
    batch, num_heads, seqlen_q, head_dim = query
    return 2 * batch * num_heads * seqlen_q * key[2] * head_dim


def weights_backward_flops(dweights: Any, lse: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """Three times the forward: the scores, and the gradients of query and key."""
    return 3 * weights_flops(lse, query, key)


def cache_flops(
    query: Any, k_cache: Any, v_cache: Any, cache_lengths: Any, key: Any, value: Any, block_table: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """2 * (D + Dv) per query and place for a key, filled or not: only the device knows how many are filled."""
    batch, num_heads, seqlen_q, head_dim = query
    capacity = k_cache[2] * (1 if block_table is None else block_table[1])
    return 2 * batch * num_heads * seqlen_q * capacity * (head_dim + v_cache[3])


def packed_forward_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    """2 * (D + Dv) per pair of a query and a key of one sequence, masked or not."""
    return 2 * _packed_pairs(query, key, *args[:2]) * (query.shape[2] + value.shape[2])


def packed_backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """2.5 times the forward, like `backward_flops`."""
    return _packed_pairs(query, key, *args[:2]) * (6 * query.shape[2] + 4 * value.shape[2])


def _packed_pairs(
    query: torch.Tensor, key: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> int:
    """Heads times the pairs of each sequence; of sequences of one length where the lengths cannot be read."""
    sequences = cu_seqlens_q.shape[0] - 1
    if torch_compat.is_fake(cu_seqlens_q) or cu_seqlens_q.is_meta:
        return query.shape[1] * query.shape[0] * key.shape[0] // max(sequences, 1)
    lengths = (ends.long().diff() for ends in (cu_seqlens_q, cu_seqlens_k))
    return query.shape[1] * int(torch.dot(*lengths))


def linear_loss_flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """2 * E per logit of hidden (N, E) and weight (V, E)."""
    return 2 * hidden[0] * weight[0] * hidden[1]


def linear_loss_sum_flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """The logits, and the gradients of hidden and weight as they are needed: each as much again."""
    *_, (needs_hidden, needs_weight, _bias), _backend = args
    return (1 + needs_hidden + needs_weight) * linear_loss_flops(hidden, weight)


def linear_loss_backward_flops(
    dlosses: Any, norms: Any, hidden: Any, weight: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits once more, and the gradients."""
    return linear_loss_sum_flops(hidden, weight, *args)


_waiting: dict[str, Callable[..., int]] = {}  # formulas by op, until the counter is imported


def register(**formulas: Callable[..., int]) -> None:
    """Give torch's FLOP counter the formulas of ops by name, now if it is loaded, else as soon as it is."""
    if COUNTER in sys.modules:
        _register_with(sys.modules[COUNTER], formulas)
        return
    if not _waiting:
        sys.meta_path.insert(0, _WhenImported())
    _waiting.update(formulas)


def _register_with(counter: ModuleType, formulas: dict[str, Callable[..., int]]) -> None:
    for op, formula in formulas.items():
        raw = formula in (packed_forward_flops, packed_backward_flops)  # they read values of cu_seqlens
        counter.register_flop_formula(getattr(torch.ops.fastattn, op), get_raw=raw)(formula)


class _WhenImported(MetaPathFinder):
    """Finds the FLOP counter once, by the other finders, and registers the formulas after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # find_spec alone, without an import, leaves the hook in place
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_with(module, _waiting)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
