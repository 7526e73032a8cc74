"""The FLOP formulas of the ops, given to torch's FLOP counter when it is first imported: that loads all of triton."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

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
        counter.register_flop_formula(getattr(torch.ops.fastattn, op))(formula)


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
            sys.meta_path.insert(0, self)  # whoever only looks for the module must not use the hook up
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
