"""`softmax`: the public call, and its registration as torch ops with fake implementations and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fastattn import backends, reference, torch_compat
from fastattn.backends import layout, switches
from fastattn.backends.replay import Replay, can_replay
from fastattn.ops import arguments, composite, plain, plan, spelling, symbolic
from fastattn.ops.registration import define
from fastattn.ops.values import may_be_refused
from fastattn.spec import SoftmaxCall, SoftmaxSpec, accumulation_dtype


@spelling.without_unknown
def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    log: bool = False,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """exp(scale * x) / sum(exp(scale * x)) along `dim` over what the mask keeps, or its logarithm, fused.

    Args:
        x: any shape and strides, float16, bfloat16, float32 or float64; sums are kept in float32 or float64.
        dim: the dimension that sums to one.
        scale: factor on x, finite, and below 2**127 unless x is float64.
        mask: bool, True = keep, broadcastable to x. What it hides is 0 (-inf in log), even if x is NaN there, and
            neither sends nor receives a gradient. An entry of -inf is hidden too, whatever the scale; so is one whose
            scaled score is -inf, as that of +inf under a negative scale. Any other score that is not finite makes
            what its row keeps NaN.
        causal: keep entry (i, j) of the last two dims where j <= i + columns - rows (bottom right); x then needs two.
        log: return the natural logarithm.
        backend: "auto", "cuda", "triton" or "torch"; a named backend that cannot run the call raises its reason.

    Returns:
        A tensor of x's shape, dtype and memory order (float32 for 16-bit x under CUDA autocast, as torch does). Where
        nothing is kept in a row, it is 0 (-inf in log) with zero gradients.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the named backend cannot run the call.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), for long rows.
    """
    planned = None
    if not unknown:
        options = (dim, scale, causal, log, (type(dim), type(scale), type(causal), type(log)), backend)
        planned, found = plan.look_up("softmax", (x, mask), options)
        if found is not None:
            return cast(Tensor, found(x, mask))
    if symbolic.any_proxy(x):
        return cast(Tensor, symbolic.record(softmax, locals()))
    if unknown:
        raise spelling.unexpected(softmax, unknown)
    args = call_arguments(x, dim, scale, mask, causal, log)
    arguments.check_backend(backend)
    if plain.wanted():
        return composed(*args)
    if (transform := composite.transform_in_use(args)) is not None:
        composite.refuse_named(backend, transform, "the masked scores")
        return composed(*args)
    if x.dim() == 0:
        return softmax(x[None], 0, scale=scale, mask=mask, log=log, backend=backend)[0]
    if may_be_refused(args, backend):
        backends.select_all(_passes(SoftmaxCall(*args)), backend)
    result: Tensor = _run(*args, backend)
    if plan.wanted(planned):
        plan.keep(planned, _SoftmaxPlan(args, backend))
    return result


class _SoftmaxPlan:
    """One kind of call of `softmax`: its specs, backends and options, without any tensor."""

    __slots__ = (
        "backend", "backward", "backward_launch", "backward_replays", "chosen", "dtype", "environment", "forward",
        "masks_diagonal", "options", "record", "spec",
    )  # fmt: skip

    def __init__(self, args: tuple[Any, ...], backend: str) -> None:
        call = SoftmaxCall(*args)
        self.backend, self.environment, self.options = backend, switches.environment(), args[2:]
        self.dtype = call.x.dtype
        passes = _passes(call)
        self.spec = passes["softmax_fwd"]
        self.chosen = backends.select(self.spec, backend, "softmax_fwd")
        self.masks_diagonal = layout.masks_diagonal(self.chosen, call)
        self.forward: Callable[..., Tensor] = self._forward
        if can_replay(self.chosen):
            self.forward = Replay(self._forward)
        elif hasattr(self.chosen, "softmax_fwd_plan"):
            self.forward = self.chosen.softmax_fwd_plan(self.spec, call) or self._forward
        self.record = self.backward = self.backward_launch = None
        self.backward_replays: plan.BackwardReplays | None = None
        if "softmax_bwd" in passes:
            spec = passes["softmax_bwd"]
            chosen = backends.select(spec, backend, "softmax_bwd")
            self.backward = partial(chosen.softmax_bwd, spec)
            if can_replay(chosen):
                self.backward_replays = plan.BackwardReplays(self._gradient)
            elif hasattr(chosen, "softmax_bwd_plan"):
                self.backward_launch = chosen.softmax_bwd_plan(spec, call.dim, call.scale, self.dtype)
            self.record = torch_compat.apply_function(plan.Recorded)

    def __call__(self, x: Tensor, mask: Tensor | None) -> Any:
        """The result of `softmax` for a call of this kind."""
        if mask is not None:
            mask = arguments.with_leading_ones(mask, x.dim())
        return self.forward(x, mask) if self.record is None else self.record(self, x, mask)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The probabilities, or their logarithms."""
        call = SoftmaxCall(x, mask, *self.options)
        if self.masks_diagonal:
            call = layout.with_diagonal_as_mask(call)
        out: Tensor = self.chosen.softmax_fwd(self.spec, call)
        return out

    def recorded(self, tensors: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor]]:
        """(the result, what the backward needs)."""
        out = self.forward(*tensors)
        return out, (out,)

    def gradients(
        self, kept: tuple[Any, ...], upstream_grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """The gradient of x, and None for the mask."""
        needs_op = self.backward is None or plan.backward_needs_op(self.environment)
        if not needs_op and self.backward_launch is not None:
            dx = self.backward_launch(upstream_grads[0], kept[0])
            if dx is not None:
                return [dx, None]
        dim, scale, _, log, _ = self.options
        args = (*upstream_grads, *kept, dim, scale)
        if not needs_op and self.backward_replays is not None:
            run = self.backward_replays.find(*upstream_grads, *kept)
            if run is not None:
                return [run(*upstream_grads, *kept), None]
            needs_op = True
        if needs_op or self.backward is None:
            return [torch.ops.fastattn.softmax_bwd.default(*args, log, self.dtype, self.backend), None]
        return [self.backward(*args, self.dtype), None]

    def _gradient(self, dout: Tensor, out: Tensor) -> Tensor:
        """The same on a backend that `can_replay`, of tensors that need not be of the classes of the plan's key."""
        dim, scale, _, log, _ = self.options
        return _softmax_bwd(dout, out, dim, scale, log, self.dtype, self.backend)


@spelling.without_unknown
def explain_softmax(
    x: Tensor, dim: int = -1, *, backend: str = "auto", scale: float = 1.0, mask: Tensor | None = None,
    causal: bool = False, log: bool = False, **unknown: NoReturn,
) -> backends.Explanation:  # fmt: skip
    """Which backend `softmax` would use for these arguments, with which tiles, and why not the others.

    It runs nothing.

    Args:
        x, dim, backend, scale, mask, causal, log: those of `softmax`.

    Returns:
        A `fastattn.backends.Explanation`; its `backward` is None where x does not require grad.

    Raises:
        ValueError, TypeError: an argument does not fit `softmax`; the message names it.
        RuntimeError: the named backend cannot run the call.
    """
    if unknown:
        raise spelling.unexpected(softmax, unknown, "explain_softmax")
    args = call_arguments(x, dim, scale, mask, causal, log)
    arguments.check_backend(backend)
    outlook = plan.outlook(x, mask, dim, scale) if x.dim() else "not planned: x has no dimension"
    return backends.explanation(_passes(SoftmaxCall(*args)), backend, outlook)


def _passes(call: SoftmaxCall) -> dict[str, SoftmaxSpec]:
    """Specs of a call's passes, the backward's too where one may follow."""
    x = call.x if call.x.dim() else call.x[None]
    passes = {"softmax_fwd": _spec(replace(call, x=x))}
    if torch.is_grad_enabled() and x.requires_grad:
        # of the output, which has the dtype of the result and x's memory order
        passes["softmax_bwd"] = SoftmaxSpec.of(x, call.dim, log=call.log, backward=True).replace(
            dtype=call.dtype
        )
    return passes


def call_arguments(
    x: Tensor, dim: int, scale: float, mask: Tensor | None, causal: bool, log: bool
) -> tuple[Any, ...]:
    """The public arguments, checked and put in the order of SoftmaxCall's fields."""
    arguments.check_tensor("x", x)
    arguments.check_floating("x", x)
    rank = x.dim()
    if isinstance(dim, bool) or not isinstance(dim, (int, torch.SymInt)):
        raise TypeError(f"dim: got {type(dim).__name__}, needs an int")
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise ValueError(f"dim: got {dim}, needs {-max(rank, 1)} to {max(rank, 1) - 1} for {rank} dimensions")
    for name, flag in (("causal", causal), ("log", log)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, needs True or False")
    if causal and rank < 2:
        raise ValueError(f"causal: got True for shape {arguments.shape_of(x)}, needs at least 2 dimensions")
    scale = arguments.finite_number("scale", scale, x.dtype)
    if mask is not None:
        mask = _mask_of_rank(mask, x)
    return x, mask, dim % max(rank, 1), scale, causal, log, _result_dtype(x)


def _mask_of_rank(mask: Tensor, x: Tensor) -> Tensor:
    arguments.check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, needs bool (True = keep)")
    if mask.device != x.device:
        raise ValueError(f"mask: got device {mask.device}, needs x's {x.device}")
    if mask.dim() > x.dim() or any(
        size != 1 and size != whole for size, whole in zip(reversed(mask.shape), reversed(x.shape))
    ):
        raise ValueError(
            f"mask: got shape {arguments.shape_of(mask)}, needs one that broadcasts to {arguments.shape_of(x)}"
        )
    return mask[(None,) * (x.dim() - mask.dim())] if mask.dim() < x.dim() else mask


def _result_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or float32 where torch's own softmax would be autocast to it."""
    autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return accumulation_dtype(x.dtype) if autocast else x.dtype


def composed(
    x: Tensor, mask: Tensor | None, dim: int, scale: float, causal: bool, log: bool, dtype: torch.dtype
) -> Tensor:
    """The call in differentiable torch operations."""
    wide = x.to(accumulation_dtype(x.dtype))
    return reference.softmax(wide, dim, scale=scale, mask=mask, causal=causal, log=log).to(dtype)


def _spec(call: SoftmaxCall) -> SoftmaxSpec:
    return SoftmaxSpec.of(
        call.x, call.dim, mask=call.mask is not None, causal=call.causal, log=call.log, backward=False
    )


def _softmax_fwd(*args: Any) -> Tensor:
    *call_args, backend = args
    call = SoftmaxCall(*call_args)
    spec = _spec(call)
    chosen = backends.select(spec, backend, "softmax_fwd")
    if call.causal and layout.masks_diagonal(chosen, call):
        call = layout.with_diagonal_as_mask(call)
    result: Tensor = chosen.softmax_fwd(spec, call)
    return result


def _softmax_fwd_fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, dtype=args[-2])


def _softmax_bwd(
    dout: Tensor, out: Tensor, dim: int, scale: float, log: bool, dtype: torch.dtype, backend: str
) -> Tensor:
    spec = SoftmaxSpec.of(out, dim, log=log, backward=True)
    run = backends.select(spec, backend, "softmax_bwd").softmax_bwd
    result: Tensor = run(spec, dout, out, dim, scale, dtype)
    return result


def _softmax_bwd_fake(dout: Tensor, out: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(out, dtype=args[-2])


def _setup_fwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, dim, scale, _, log, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.options = (dim, scale, log, x.dtype, backend)
    ctx.save_for_backward(output)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None
    if dout is not None:
        dx = _run_backward(dout, *ctx.saved_tensors, *ctx.options)
    return (dx, *(None,) * 7)


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dout, out, dim, scale, log, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.options = (dim, scale, log)
    ctx.save_for_backward(dout, out)


def _double_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Derivatives of dx = scale * y * (dy - sum(y * dy)), in log scale * (dy - exp(y) * sum(dy)), by dy and y."""
    nothing = (None,) * 7
    if grad is None:
        return nothing
    dout, out = ctx.saved_tensors
    dim, scale, log = ctx.options
    visible = out != (-torch.inf if log else 0.0)
    grad = torch.where(visible, grad.to(out.dtype) * scale, 0)
    dout = torch.where(visible, dout, 0)
    if not log:
        total = (grad * out).sum(dim, keepdim=True)
        of_dout = out * (grad - total)
        of_out = grad * (dout - (dout * out).sum(dim, keepdim=True)) - dout * total
        return (of_dout, of_out, *nothing[2:])
    probs = torch.exp(out)
    weighted = grad * probs
    of_dout = torch.where(visible, grad - weighted.sum(dim, keepdim=True), 0)
    return (of_dout, -weighted * dout.sum(dim, keepdim=True), *nothing[2:])


_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_run_backward = define(
    _LIBRARY,
    "softmax_bwd",
    "(Tensor dout, Tensor out, int dim, float scale, bool log, ScalarType dtype, str backend) -> Tensor",
    _softmax_bwd,
    _softmax_bwd_fake,
    (_setup_bwd, _double_backward),
)
_run = define(
    _LIBRARY,
    "softmax_fwd",
    "(Tensor x, Tensor? mask, int dim, float scale, bool causal, bool log, ScalarType dtype, str backend) -> Tensor",
    _softmax_fwd,
    _softmax_fwd_fake,
    (_setup_fwd, _backward),
)
