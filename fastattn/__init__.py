"""Fused attention for PyTorch: every mask, bias and gradient, on every device, and it says which kernel ran."""

from fastattn import reference
from fastattn.ops.attention import attention, explain

__all__ = ["attention", "explain", "reference"]
