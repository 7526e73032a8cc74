"""Softmax and cross-entropy on the CUDA backend: calls of the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import extension
from fastattn.backends import linear_cross_entropy
from fastattn.backends.cuda.calls import run
from fastattn.backends.linear_cross_entropy import LinearGrads
from fastattn.spec import (
    CrossEntropyCall,
    LinearCrossEntropyCall,
    SoftmaxCall,
    SoftmaxSpec,
)

CLUSTER_ARCH = 90  # the first compute capability with thread block clusters


def softmax_tiles(spec: SoftmaxSpec) -> str:
    """One line on how a row is distributed over lanes, warps and blocks."""
    clusters = (spec.arch or 0) >= CLUSTER_ARCH
    plan = extension.module().softmax_plan(spec.columns, spec.dtype.itemsize, spec.backward, clusters)
    elements, lanes, warps, blocks = plan
    held = f"{elements} elements a thread" if elements else "read twice"
    cluster = f", {blocks} blocks" if blocks > 1 else ""
    return f"a row on {lanes * warps * blocks} threads{cluster}, {held}"


def softmax_fwd(spec: SoftmaxSpec, call: SoftmaxCall) -> Tensor:
    """exp(scale * x) over its sum along a dimension, or the logarithm; constant where masked."""
    result: Tensor = run(
        "softmax_forward", call.x, call.mask, call.dim, call.scale, call.causal, call.log, call.dtype
    )
    return result


def softmax_bwd(
    spec: SoftmaxSpec, dout: Tensor, out: Tensor, dim: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """scale * out * (dout - sum(out * dout)), in log scale * (dout - exp(out) * sum(dout)); 0 where out is constant."""
    result: Tensor = run("softmax_backward", dout, out, dim, scale, spec.log, dtype)
    return result


def cross_entropy_fwd(spec: SoftmaxSpec, call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    """(losses, norms), float32: (N,), 0 where ignored, and the parts of lse, (N, 2)."""
    losses, norms = run(
        "cross_entropy_forward", call.logits, call.target, call.ignore_index, call.label_smoothing,
        call.class_weight, call.z_loss,
    )  # fmt: skip
    return losses, norms


def cross_entropy_bwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient of the logits, as `torch_cross_entropy` states it, written to `out` if given, which may be z."""
    dlogits: Tensor = run(
        "cross_entropy_backward", dlosses.float(), norms, call.logits, call.target, call.ignore_index,
        call.label_smoothing, call.class_weight, call.z_loss, out,
    )  # fmt: skip
    return dlogits


def linear_cross_entropy_fwd(
    spec: SoftmaxSpec,
    call: LinearCrossEntropyCall,
    needs: tuple[bool, ...] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, norms) without all the logits, and the needed gradients of the sum of losses times `scale`."""
    return linear_cross_entropy.forward(spec, call, needs, cross_entropy_fwd, cross_entropy_bwd, scale)


def linear_cross_entropy_bwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, dlosses: Tensor, norms: Tensor, needs: tuple[bool, ...]
) -> LinearGrads:
    """The gradients of hidden, weight and bias that are needed, from logits computed again."""
    return linear_cross_entropy.backward(spec, call, dlosses, norms, needs, cross_entropy_bwd)
