"""Fused attention for PyTorch: every mask, bias and gradient, on every device; `explain` says which kernel runs."""

from importlib import import_module
from typing import Any

from fastattn.collector import paused as _paused

with _paused():
    from fastattn import reference, vector_math
    from fastattn.integrations.swap import SwapReport, restore_attention, swap_attention
    from fastattn.integrations.torch import sdpa_override
    from fastattn.nn.attention import MultiHeadAttention
    from fastattn.ops.attention import attention, explain
    from fastattn.ops.cross_entropy import cross_entropy, explain_cross_entropy
    from fastattn.ops.kv_cache import attention_kv_cache, explain_kv_cache
    from fastattn.ops.linear_cross_entropy import explain_linear_cross_entropy, linear_cross_entropy
    from fastattn.ops.sdpa import scaled_dot_product_attention
    from fastattn.ops.softmax import explain_softmax, softmax
    from fastattn.ops.varlen import attention_varlen, explain_varlen

vector_math.set_up()  # here, for results of torch's own calls too

__all__ = [
    "MultiHeadAttention",
    "SwapReport",
    "attention",
    "attention_kv_cache",
    "attention_varlen",
    "cross_entropy",
    "explain",
    "explain_cross_entropy",
    "explain_kv_cache",
    "explain_linear_cross_entropy",
    "explain_softmax",
    "explain_varlen",
    "linear_cross_entropy",
    "plot_attention",
    "reference",
    "restore_attention",
    "scaled_dot_product_attention",
    "sdpa_override",
    "softmax",
    "swap_attention",
]

__version__: str  # read on first use
_ON_FIRST_USE = ("integrations", "models", "train")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return import_module(f"fastattn.{name}")
    if name == "plot_attention":
        from fastattn import plot

        globals()[name] = plot.plot_attention
        return globals()[name]
    if name == "__version__":
        from fastattn import versions

        globals()[name] = versions.version("fastattn")
        return globals()[name]
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ON_FIRST_USE, "__version__"})
