"""Losses with class weights and z-loss that every backend's kernels are tested with, and torch's own results."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.spec import CrossEntropyCall
from numerics import assert_within_rule, plain_in_any_order

OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {"weighted": True},
    "weights, smoothing": {"weighted": True, "smoothing": 0.2},
    "z-loss": {"z_loss": 0.05},
    "weights, smoothing, z-loss": {"weighted": True, "smoothing": 0.2, "z_loss": 0.05},
}


def inputs(
    dtype: torch.dtype, rows: int, classes: int, options: dict[str, Any], device: str = "cpu"
) -> tuple[CrossEntropyCall, Tensor]:
    """(call, upstream); the second row is ignored and holds NaN, the first class weighs nothing."""
    logits = (4 * torch.randn(rows, classes, device=device)).to(dtype)
    target = torch.randint(0, classes, (rows,), device=device)
    target[1], logits[1] = -100, float("nan")
    weight = None
    if options.get("weighted"):
        weight = 2 * torch.rand(classes, device=device)
        weight[0] = 0.0
    smoothing, z_loss = options.get("smoothing", 0.0), options.get("z_loss", 0.0)
    return CrossEntropyCall(logits, target, -100, smoothing, weight, z_loss), torch.randn(rows, device=device)


def torchs(call: CrossEntropyCall, upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(losses, dlogits) by torch's cross_entropy and logsumexp, in `dtype`."""
    kept = call.target != call.ignore_index
    leaf = call.logits.to(dtype).masked_fill(~kept[:, None], 0).requires_grad_()
    weight = None if call.class_weight is None else call.class_weight.to(dtype)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": call.label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(leaf, call.target, **options)
    losses = losses + call.z_loss * leaf.logsumexp(1).square() * kept
    return losses, torch.autograd.grad(losses, leaf, upstream.to(dtype))[0]


def assert_as_torchs(call: CrossEntropyCall, upstream: Tensor, losses: Tensor, dlogits: Tensor) -> None:
    """Within the rule, and without gradient in the ignored row."""
    golden = torchs(call, upstream, torch.float64)
    naive = plain_in_any_order(partial(torchs, call, upstream, call.logits.dtype), golden)
    assert_within_rule(losses, naive[0], golden[0], "losses")
    assert_within_rule(dlogits, naive[1], golden[1], "dlogits")
    assert not dlogits[1].any()
