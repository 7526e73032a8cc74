"""`attention_varlen` after its arguments are checked, and its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from fastattn import backends, torch_compat
from fastattn.backends import layout, switches
from fastattn.backends.replay import Replay, can_replay
from fastattn.ops import arguments, plan
from fastattn.ops.registration import at_positions
from fastattn.spec import AttentionGrads, AttentionSpec, GradsNeeded, VarlenCall

NAMES = [field.name for field in fields(VarlenCall)]
TENSORS = [field.name for field in fields(VarlenCall) if "Tensor" in str(field.type)]  # the first fields
DIFFERENTIABLE = ("query", "key", "value", "alibi_slopes", "sinks")


def kernel_call(call_args: Sequence[Any]) -> VarlenCall:
    """The call that a spec is made of: operands of adjacent columns."""
    call = layout.operands(VarlenCall(*call_args))
    if call.query.is_cuda and min(call.max_seqlen_q, call.max_seqlen_k) < 0:
        check_not_captured()
    return call


def check_not_captured() -> None:
    """Refuse a call without bounds of its lengths while a CUDA graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "max_seqlen_q, max_seqlen_k: got None, needs integers while a CUDA graph is captured"
        )


def check_values(call: VarlenCall) -> None:
    """Check values, which needs real data and is done on a CPU, where it costs no synchronisation."""
    if call.query.device.type != "cpu":
        return
    for name, cu_seqlens, tokens, bound in (
        ("cu_seqlens_q", call.cu_seqlens_q, call.query.shape[0], call.max_seqlen_q),
        ("cu_seqlens_k", call.cu_seqlens_k, call.key.shape[0], call.max_seqlen_k),
    ):
        offsets = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(offsets)]
        first, last = offsets[0], offsets[-1]
        if first != 0 or min(lengths, default=0) < 0 or last > tokens:
            got = f"{offsets}" if len(offsets) <= 9 else f"values from {first} to {last}"
            raise ValueError(
                f"{name}: got {got}, needs ascending values from 0 to at most {tokens} (the tokens)"
            )
        longest = max(lengths, default=0)
        if 0 <= bound < longest:
            raise ValueError(
                f"max_seqlen_{name[-1]}: got {bound}, needs at least {longest} (the longest sequence)"
            )


def backward(
    spec: AttentionSpec, chosen: ModuleType, call: VarlenCall, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, needs: GradsNeeded,
) -> AttentionGrads:  # fmt: skip
    """The gradients of a call on the backend chosen for its backward."""
    spec, *residuals = layout.upstream(chosen, spec, out, lse, dout, dlse)
    grads: AttentionGrads = chosen.varlen_bwd(spec, layout.for_backend(chosen, call, spec), *residuals, needs)
    return grads


class VarlenPlan:
    """One kind of call of `attention_varlen`: its specs, backends and options, without any tensor."""

    __slots__ = (
        "backend", "backward", "backward_replays", "backward_spec", "chosen", "environment", "has_bounds", "launch",
        "needs", "options", "record", "replay", "return_lse", "spec",
    )  # fmt: skip

    def __init__(self, args: tuple[Any, ...], backend: str, return_lse: bool) -> None:
        call = kernel_call(args)
        whole = call.as_one_sequence()
        self.backend, self.return_lse, self.environment = backend, return_lse, switches.environment()
        self.options = args[len(TENSORS) :]
        self.spec = AttentionSpec.of(whole)
        self.chosen = backends.select(self.spec, backend, "varlen_fwd")
        self.launch: Any = None
        if call.query is args[0] and call.key is args[1] and call.value is args[2]:
            make = getattr(self.chosen, "varlen_fwd_plan", None)
            self.launch = None if make is None else make(self.spec, call)
        self.needs = [arguments.requires_grad(args[NAMES.index(name)]) for name in DIFFERENTIABLE]
        self.has_bounds = min(call.max_seqlen_q, call.max_seqlen_k) >= 0
        self.replay = Replay(self._forward) if can_replay(self.chosen) else None
        self.backward_replays: plan.BackwardReplays | None = None
        self.record = None
        if torch.is_grad_enabled() and any(self.needs):
            self.record = torch_compat.apply_function(plan.Recorded)
            self.backward_spec = AttentionSpec.of(whole, self._needed())
            self.backward = backends.select(self.backward_spec, backend, "varlen_bwd")
            if can_replay(self.backward):
                self.backward_replays = plan.BackwardReplays(self._gradients)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        alibi_slopes: Tensor | None, sinks: Tensor | None, dropout_seed: int | Tensor | None,
    ) -> Any:  # fmt: skip
        """The results of `attention_varlen` for a call of this kind."""
        if self.launch is not None and self.record is None and dropout_seed is None:
            results = self.launch(query, key, value, cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
            if results is not None:
                return results if self.return_lse else results[0]
        slopes = None if alibi_slopes is None else arguments.as_slopes(alibi_slopes, query.dtype)
        sinks = None if sinks is None else arguments.as_sinks(sinks, query.dtype)
        offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        tensors: tuple[Tensor | None, ...] = (query, key, value, *offsets, slopes, sinks)
        if self.spec.dropout:
            check_values(self.call((*tensors, None)))  # a refused call draws no seed
            tensors = (*tensors, arguments.seed_tensor(dropout_seed, query))
        else:
            arguments.check_seed(dropout_seed)
            tensors = (*tensors, None)
        out, lse = self.forward(tensors) if self.record is None else self.record(self, *tensors)
        return (out, lse) if self.return_lse else out

    def call(self, tensors: Sequence[Any]) -> VarlenCall:
        """The call with these tensors."""
        return kernel_call((*tensors, *self.options))

    def forward(self, tensors: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        if self.launch is not None:
            query, key, value, cu_seqlens_q, cu_seqlens_k = tensors[:5]
            results = self.launch(query, key, value, cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
            if results is not None:
                return cast("tuple[Tensor, Tensor]", results)
        if self.replay is None:
            call = self.call(tensors)
            check_values(call)
            out, lse = self.chosen.varlen_fwd(self.spec, layout.for_backend(self.chosen, call, self.spec))
            return out, lse
        if tensors[0].is_cpu:
            check_values(self.call(tensors))
        elif not self.has_bounds and tensors[0].is_cuda:
            check_not_captured()
        out, lse = self.replay(*tensors)
        return out, lse

    def _forward(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        """The same of values that were checked."""
        call = layout.for_backend(self.chosen, self.call(tensors), self.spec)
        out, lse = self.chosen.varlen_fwd(self.spec, call)
        return out, lse

    def recorded(self, tensors: tuple[Any, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
        """((out, lse), what the backward needs)."""
        results = self.forward(tensors)
        return results, (*tensors, *results)

    def gradients(
        self, kept: tuple[Any, ...], upstream_grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """A gradient or None for each tensor."""
        *tensors, out, lse = kept
        dout, dlse = upstream_grads
        dout = torch.zeros_like(out) if dout is None else dout
        needs_op, run = plan.backward_needs_op(self.environment), None
        if not needs_op and self.backward_replays is not None:
            run = self.backward_replays.find(dout, dlse, *kept)
            needs_op = run is None
        if run is not None:
            grads = run(dout, dlse, *kept)
        elif needs_op:
            op = torch.ops.fastattn.varlen_bwd.default
            grads = op(dout, dlse, out, lse, *tensors, *self.options, self.needs, self.backend)
        else:
            found = backward(
                self.backward_spec, self.backward, self.call(tensors), out, lse, dout, dlse, self._needed()
            )
            grads = [getattr(found, name) for name in DIFFERENTIABLE]
        return at_positions(len(tensors), map(NAMES.index, DIFFERENTIABLE), grads, self.needs)

    def _gradients(self, dout: Tensor, dlse: Tensor | None, *kept: Any) -> tuple[Tensor | None, ...]:
        """The same on a backend that `can_replay`, of tensors that need not be of the classes of the plan's key."""
        *tensors, out, lse = kept
        call = self.call(tensors)
        spec = AttentionSpec.of(call.as_one_sequence(), self._needed())
        chosen = backends.select(spec, self.backend, "varlen_bwd")
        found = backward(spec, chosen, call, out, lse, dout, dlse, self._needed())
        return tuple(getattr(found, name) for name in DIFFERENTIABLE)

    def _needed(self) -> GradsNeeded:
        return GradsNeeded(**dict(zip(DIFFERENTIABLE, self.needs)))
