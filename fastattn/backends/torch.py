"""The backend for every device: torch operations, in O(S) memory, forward and backward."""

from fastattn.backends.torch_attention import (
    attention_bwd,
    attention_fwd,
    attention_weights_bwd,
    attention_weights_fwd,
    tiles,
)
from fastattn.spec import AttentionSpec

__all__ = [
    "NAME",
    "attention_bwd",
    "attention_fwd",
    "attention_weights_bwd",
    "attention_weights_fwd",
    "tiles",
    "why_not",
]

NAME = "torch"


def why_not(spec: AttentionSpec) -> str | None:
    """This backend runs everything."""
    return None
