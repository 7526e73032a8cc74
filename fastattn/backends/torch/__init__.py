"""The backend for every device: torch operations, in O(S) memory, forward and backward."""

from fastattn.backends import layout
from fastattn.backends.torch.attention import (
    attention_bwd,
    attention_fwd,
    tiles,
)
from fastattn.backends.torch.attention_weights import attention_weights_bwd, attention_weights_fwd
from fastattn.backends.torch.cross_entropy import (
    cross_entropy_bwd,
    cross_entropy_fwd,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    read_targets,
)
from fastattn.backends.torch.kv_cache import kv_cache_fwd, kv_cache_tiles
from fastattn.backends.torch.softmax import (
    softmax_bwd,
    softmax_bwd_plan,
    softmax_fwd,
    softmax_fwd_plan,
    softmax_tiles,
)
from fastattn.backends.torch.varlen import varlen_bwd, varlen_fwd, varlen_fwd_plan, varlen_tiles
from fastattn.backends.torch.whole_call import (
    attention_bwd_plan,
    attention_fwd_plan,
    kv_cache_fwd_plan,
    masked_fwd_plan,
)
from fastattn.spec import AttentionSpec, SoftmaxSpec

__all__ = [
    "LAYOUT",
    "MAKES_GRADIENTS",
    "NAME",
    "attention_bwd",
    "attention_bwd_plan",
    "attention_fwd",
    "attention_fwd_plan",
    "attention_weights_bwd",
    "attention_weights_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "kv_cache_fwd",
    "kv_cache_fwd_plan",
    "kv_cache_tiles",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "masked_fwd_plan",
    "read_targets",
    "softmax_bwd",
    "softmax_bwd_plan",
    "softmax_fwd",
    "softmax_fwd_plan",
    "softmax_tiles",
    "tiles",
    "varlen_bwd",
    "varlen_fwd",
    "varlen_fwd_plan",
    "varlen_tiles",
    "why_not",
]

NAME = "torch"
LAYOUT = layout.STRIDED
MAKES_GRADIENTS = ("cross_entropy_fwd",)


def why_not(spec: AttentionSpec | SoftmaxSpec) -> str | None:
    """This backend runs everything."""
    return None
