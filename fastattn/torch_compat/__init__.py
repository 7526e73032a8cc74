"""The only home of private torch symbols: each is looked up once by `find` and has a fallback where torch lacks it.

Callers import this package and write `torch_compat.name(...)`. A name that a torch release removes costs speed at most:
the call then takes torch's dispatcher or its public functions.
"""

from __future__ import annotations

from .attention import (
    cpu_flash_attention,
    cpu_flash_attention_backward,
    cpu_flash_kernel,
    has_cpu_flash_attention,
    override_flash_attention,
    torch_sdpa,
)
from .norms import rms_norm_backward
from .objects import copy_of_several, cuda_sleep, has_hooks, hooks_of, version_of
from .optimizers import adamw, muon
from .products import (
    ONEDNN_MIN_PRODUCTS,
    has_fast_products,
    has_int8_dot_products,
    has_int8_linear,
    has_onednn_linear,
    has_packed_linear,
    instructions,
    int8_linear,
    onednn_linear,
    pack_int8_linear,
    pack_linear,
    packed_linear,
    product,
)
from .softmax_kernels import softmax, softmax_backward, softmax_gradient, softmax_gradient_kernel
from .state import (
    PLAIN_KEYS,
    PLAIN_TENSOR_KEYS,
    any_requires_grad,
    apply_function,
    can_bypass_dispatcher,
    dispatch_mode,
    dispatch_mode_active,
    dual_level_entered,
    graph_task,
    has_dispatch_mode,
    has_graph_task,
    is_exporting,
    is_fake,
    is_wrapped,
    nothing_records,
    only_autograd_records,
    state_of_call,
    tensor_guard,
    transforms_active,
)

__all__ = [
    "ONEDNN_MIN_PRODUCTS",
    "PLAIN_KEYS",
    "PLAIN_TENSOR_KEYS",
    "adamw",
    "any_requires_grad",
    "apply_function",
    "can_bypass_dispatcher",
    "copy_of_several",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "cpu_flash_kernel",
    "cuda_sleep",
    "dispatch_mode",
    "dispatch_mode_active",
    "dual_level_entered",
    "graph_task",
    "has_cpu_flash_attention",
    "has_dispatch_mode",
    "has_fast_products",
    "has_graph_task",
    "has_hooks",
    "has_int8_dot_products",
    "has_int8_linear",
    "has_onednn_linear",
    "has_packed_linear",
    "hooks_of",
    "instructions",
    "int8_linear",
    "is_exporting",
    "is_fake",
    "is_wrapped",
    "muon",
    "nothing_records",
    "onednn_linear",
    "only_autograd_records",
    "override_flash_attention",
    "pack_int8_linear",
    "pack_linear",
    "packed_linear",
    "product",
    "rms_norm_backward",
    "softmax",
    "softmax_backward",
    "softmax_gradient",
    "softmax_gradient_kernel",
    "state_of_call",
    "tensor_guard",
    "torch_sdpa",
    "transforms_active",
    "version_of",
]
