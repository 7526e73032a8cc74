"""`attention` after its arguments are checked: forward and backward on a chosen backend, and plans of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import backends, torch_compat
from fastattn.backends import layout, switches
from fastattn.backends.replay import Replay, can_replay
from fastattn.ops import arguments, padding, plan
from fastattn.ops.registration import at_positions
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, GradsNeeded
from fastattn.strides import with_adjacent_columns

NAMES = [field.name for field in fields(AttentionCall)]
TENSORS = [field.name for field in fields(AttentionCall) if "Tensor" in str(field.type)]  # the first fields
LENGTHS = NAMES.index("key_lengths")
POSITIONS = [NAMES.index(name) for name in GradsNeeded._fields]


def kernel_call(call_args: tuple[Any, ...] | list[Any]) -> AttentionCall:
    """The call that a spec is made of: operands of adjacent columns, a bias within the range of the scores."""
    query, key, value, mask, bias, *rest = call_args
    bias = None if bias is None else arguments.saturated(bias, query.dtype)
    return layout.operands(AttentionCall(query, key, value, mask, bias, *rest))


def check_values(call: AttentionCall) -> None:
    """Check values, which needs real data and is done on a CPU, where it costs no synchronisation."""
    lengths = call.key_lengths
    if lengths is None or lengths.device.type != "cpu" or lengths.numel() == 0:
        return
    if torch_compat.is_wrapped(lengths) or torch.compiler.is_compiling():
        return
    shortest, longest = (int(n) for n in torch.aminmax(lengths))
    if shortest < 0 or longest > call.key.shape[2]:
        raise ValueError(
            f"key_lengths: got values from {shortest} to {longest}, needs 0 to {call.key.shape[2]} (the key length)"
        )


def forward(spec: AttentionSpec, chosen: ModuleType, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call on the backend chosen for it."""
    if padding.may_hide_keys(call):
        if padding.looks_first(chosen, call):
            out, lse = chosen.attention_fwd(spec, call)
            if padding.all_finite(out):  # otherwise a hidden key's NaN may have reached the result
                return out, lse
        call = padding.without_hidden_keys(call, padding.hidden_keys(call))
        spec = AttentionSpec.of(call)
    out, lse = chosen.attention_fwd(spec, layout.for_backend(chosen, call, spec))
    return out, lse


def backward(
    spec: AttentionSpec, chosen: ModuleType, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, needs: GradsNeeded,
) -> AttentionGrads:  # fmt: skip
    """The gradients of a call on the backend chosen for its backward."""
    call, hidden = padding.cleaned(chosen, call, call.query, call.key, call.value, dout)
    if hidden is not None:
        spec = AttentionSpec.of(call, needs)
    spec, *residuals = layout.upstream(chosen, spec, out, lse, dout, dlse)
    call = layout.for_backend(chosen, call, spec)
    grads: AttentionGrads = chosen.attention_bwd(spec, call, *residuals, needs)
    padding.zero_hidden((grads.key, grads.value), hidden)
    return grads


def _only_masked(args: tuple[Any, ...]) -> bool:
    """Whether a call has a mask and no other tensor but the operands."""
    given = [name for name, arg in zip(TENSORS, args) if arg is not None]
    return given == ["query", "key", "value", "mask"]


class AttentionPlan:
    """One kind of call of `attention`: its specs, backends and options, without any tensor."""

    __slots__ = (
        "backend", "backward", "backward_launch", "backward_replays", "backward_spec", "bare", "chosen", "dtype",
        "environment", "launch", "masked_launch", "needs", "options", "record", "records", "spec",
    )  # fmt: skip

    def __init__(self, args: tuple[Any, ...], backend: str, bare: bool, return_lse: bool) -> None:
        call = kernel_call(args)
        self.backend, self.environment = backend, switches.environment()
        self.options, self.dtype = args[len(TENSORS) :], call.query.dtype
        self.spec = AttentionSpec.of(call)
        self.chosen = backends.select(self.spec, backend)
        call = layout.for_backend(self.chosen, call, self.spec)
        self.bare = bare  # no tensor but query, key and value, and no seed to look at
        self.needs = GradsNeeded(*(arguments.requires_grad(args[position]) for position in POSITIONS))
        self.records = torch.is_grad_enabled() and any(self.needs)
        self.launch: Any = None
        self.masked_launch: Any = None
        self.backward_launch: Any = None
        self.backward_replays: plan.BackwardReplays | None = None
        as_it_is = call.query is args[0] and call.key is args[1] and call.value is args[2]
        if self.bare and as_it_is and hasattr(self.chosen, "attention_fwd_plan"):
            wants_lse = return_lse or self.records
            self.launch = self.chosen.attention_fwd_plan(self.spec, call, return_lse, wants_lse)
        elif as_it_is and not self.records and hasattr(self.chosen, "masked_fwd_plan") and _only_masked(args):
            self.masked_launch = self.chosen.masked_fwd_plan(self.spec, call, return_lse)
        elif can_replay(self.chosen):
            self.launch = Replay(self._forward)
        if self.records:
            self.record = torch_compat.apply_function(plan.Recorded)
            self.backward_spec = AttentionSpec.of(call, self.needs)
            self.backward = backends.select(self.backward_spec, backend, "attention_bwd")
            if self.bare and as_it_is and hasattr(self.backward, "attention_bwd_plan"):
                self.backward_launch = self.backward.attention_bwd_plan(self.backward_spec, call, self.needs)
            elif can_replay(self.backward):
                self.backward_replays = plan.BackwardReplays(self._gradients)

    def runner(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """(out, lse) of calls of this kind from their tensors, by the shortest way for them."""
        if self.launch is not None and self.bare:
            launch: Callable[..., tuple[Tensor, Tensor]] = self.launch
            return partial(self.record, self) if self.records else launch
        return self._results if self.masked_launch is None else self._masked_results

    def _masked_results(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        if others[-1] is None:  # the seed, which no key holds
            whole = mask if mask.dim() == 4 else arguments.with_leading_ones(mask, 4)
            found = self.masked_launch(query, key, value, whole)
            if found is not None:
                out, lse = found
                return out, lse
        return self._results(query, key, value, mask, *others)

    def _results(self, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value) if self.bare else self._normalised(query, key, value, *others)
        out, lse = self.record(self, *tensors) if self.records else self.forward(tensors)
        return out, lse

    def _normalised(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
        query_segments: Tensor | None, key_segments: Tensor | None, key_lengths: Tensor | None,
        alibi_slopes: Tensor | None, sinks: Tensor | None, dropout_seed: int | Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """The tensors of AttentionCall, in order. Shapes and dtypes are those of the key; values are looked at here."""
        mask, bias = (None if t is None else arguments.with_leading_ones(t, 4) for t in (mask, bias))
        query_segments, key_segments = (
            None if ids is None else arguments.as_int32("segment_ids", ids)
            for ids in (query_segments, key_segments)
        )
        if key_lengths is not None:
            key_lengths = arguments.as_int32("key_lengths", key_lengths)
        slopes = None if alibi_slopes is None else arguments.as_slopes(alibi_slopes, self.dtype)
        sinks = None if sinks is None else arguments.as_sinks(sinks, self.dtype)
        seed = None
        if self.spec.dropout:
            # a refused call draws none
            check_values(AttentionCall(query, key, value, key_lengths=key_lengths))
            seed = arguments.seed_tensor(dropout_seed, query)
        else:
            arguments.check_seed(dropout_seed)
        return query, key, value, mask, bias, query_segments, key_segments, key_lengths, slopes, sinks, seed

    def call(self, tensors: tuple[Tensor | None, ...]) -> AttentionCall:
        """The call with these tensors."""
        return kernel_call(self.arguments(tensors))

    def arguments(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """The arguments of the op with these tensors."""
        return (*tensors, *(None,) * (len(TENSORS) - len(tensors)), *self.options)

    def forward(self, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        if self.launch is None:
            call = self.call(tensors)
            check_values(call)
            return forward(self.spec, self.chosen, call)
        if not self.bare and (lengths := tensors[LENGTHS]) is not None and lengths.is_cpu:
            check_values(self.call(tensors))
        out, lse = self.launch(*tensors)
        return out, lse

    def _forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same of values that were checked."""
        return forward(self.spec, self.chosen, self.call(tensors))

    def recorded(self, tensors: tuple[Any, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
        """((out, lse), what the backward needs)."""
        results = self.launch(*tensors) if self.bare and self.launch is not None else self.forward(tensors)
        return results, (*tensors, *results)

    def gradients(
        self, kept: tuple[Any, ...], upstream_grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """A gradient or None for each tensor."""
        *tensors, out, lse = kept
        dout, dlse = upstream_grads
        dout = torch.zeros_like(out) if dout is None else dout
        grads: Any = None
        needs_op = plan.backward_needs_op(self.environment)
        if not needs_op and self.backward_replays is not None:
            run = self.backward_replays.find(dout, dlse, *kept)
            needs_op = run is None
            if run is not None:
                grads = run(dout, dlse, *kept)
        if needs_op:
            op = torch.ops.fastattn.attention_bwd.default
            grads = op(dout, dlse, out, lse, *self.arguments(tuple(tensors)), list(self.needs), self.backend)
        elif grads is None:
            if self.backward_launch is not None and dlse is None:
                grads = self.backward_launch(*tensors, out, lse, with_adjacent_columns(dout))
            if grads is None:
                call = self.call(tuple(tensors))
                rest = (out, lse, dout, dlse, self.needs)
                grads = backward(self.backward_spec, self.backward, call, *rest)
        return at_positions(len(tensors), POSITIONS, grads, self.needs)

    def _gradients(self, dout: Tensor, dlse: Tensor | None, *kept: Any) -> tuple[Tensor | None, ...]:
        """The same on a backend that `can_replay`, of tensors that need not be of the classes of the plan's key."""
        *tensors, out, lse = kept
        call = self.call(tuple(tensors))
        spec = AttentionSpec.of(call, self.needs)
        chosen = backends.select(spec, self.backend, "attention_bwd")
        return backward(spec, chosen, call, out, lse, dout, dlse, self.needs)
