"""Takes one feature of the matrix away while that feature's tests run: a pytest plugin, `pytest -p feature_mutations`.

Each row of tests/features.py has a mutation here: calls that ask for the feature are refused, or its result is made
wrong. FASTATTN_FEATURE_OUTCOMES names a file that gets, by test, what became of it without the feature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol
from features import FEATURES

import fastattn
from fastattn import backends, philox
from fastattn.spec import AttentionCall, AttentionSpec, KVCacheCall, VarlenCall

Mutation = Callable[[pytest.MonkeyPatch], None]
VARIABLE = "FASTATTN_FEATURE_OUTCOMES"
KERNEL_BACKENDS = backends.BACKENDS[1:]  # Triton and torch: the extension has no column


class TakenAway(Exception):
    """The feature that a call asks for is not there."""


def refusing(asks: Callable[[Any], Any], *kinds: type) -> Mutation:
    """Calls of these kinds, those of attention by default, are refused where they ask for the feature."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        for kind in kinds or (AttentionCall,):
            make = kind.__init__

            def init(self: Any, *args: Any, make: Any = make, **options: Any) -> None:
                make(self, *args, **options)
                if asks(self):
                    raise TakenAway

            patch.setattr(kind, "__init__", init)

    return mutate


def refusing_gradient(name: str) -> Mutation:
    """Backward calls are refused where they need this gradient."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        spec_of = AttentionSpec.of

        def of(call: Any, needs: Any = None) -> Any:
            if needs is not None and getattr(needs, name):
                raise TakenAway
            return spec_of(call, needs)

        patch.setattr(AttentionSpec, "of", staticmethod(of))

    return mutate


def refusing_option(*names: str) -> Mutation:
    """`fastattn.attention` is refused where one of these options is given."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        attend = fastattn.attention

        def attention(*args: Any, **options: Any) -> Any:
            if any(options.get(name) for name in names):
                raise TakenAway
            return attend(*args, **options)

        patch.setattr(fastattn, "attention", attention)

    return mutate


def wrapping(ops: tuple[str, ...], change: Callable[..., Any]) -> Mutation:
    """The backends' functions of these names become change(function, *arguments)."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        for backend in KERNEL_BACKENDS:
            for op in ops:
                if hasattr(backend, op):
                    function = getattr(backend, op)
                    patch.setattr(backend, op, lambda *a, f=function, **k: change(f, *a, **k))

    return mutate


def _refuse(function: Any, *args: Any, **options: Any) -> Any:
    raise TakenAway


def _without_dlse(
    function: Any, spec: Any, call: Any, out: Any, lse: Any, dout: Any, dlse: Any, *rest: Any
) -> Any:
    return function(spec, call, out, lse, dout, None if dlse is None else torch.zeros_like(dlse), *rest)


def _nan_in_empty_rows(function: Any, *args: Any, **options: Any) -> Any:
    out, lse = function(*args, **options)
    return out.masked_fill((lse == -torch.inf)[..., None], torch.nan), lse


_runs = iter(range(10**9))


def _other_bits_each_run(function: Any, *args: Any, **options: Any) -> Any:
    grads = function(*args, **options)
    return grads._replace(query=grads.query * (1 + next(_runs) / 8))


def _other_bits_in_a_batch(function: Any, spec: Any, call: Any, *rest: Any) -> Any:
    out, lse = function(spec, call, *rest)
    return out * (1 + call.query.shape[0]), lse


def _length_leaves_the_device(function: Any, spec: Any, call: Any, *rest: Any, **options: Any) -> Any:
    int(call.cu_seqlens_q.max())
    return function(spec, call, *rest, **options)


def _in_a_backward_that_is_differentiated(call: Any) -> bool:
    twice = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
    return twice or _under_a_transform(call)


def _under_a_transform(call: Any) -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def _any(call: Any) -> bool:
    return True


def _breaking_the_graph(patch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "attention_varlen"):
        op = getattr(fastattn, name)

        def broken(*args: Any, op: Any = op, **options: Any) -> Any:
            torch._dynamo.graph_break()
            return op(*args, **options)

        patch.setattr(fastattn, name, broken)


def _another_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(philox, "MULTIPLIER", philox.MULTIPLIER[::-1])
    refusing(lambda call: call.dropout_p)(patch)


def _no_explanation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fastattn, "explain", _refuse)


ABSENT: dict[str, Mutation] = {
    "dtypes, forward and backward": refusing(_any),
    "largest head dim": refusing(lambda call: call.query.shape[3] == 256),
    "head dims that are no multiple of 8": refusing(lambda call: call.query.shape[3] % 8),
    "values of another head dim": refusing(lambda call: call.query.shape[3] != call.value.shape[3]),
    "causal to the last key (bottom right)": refusing(lambda call: call.causal == "bottom_right"),
    "causal from the first key (top left)": refusing(lambda call: call.causal == "top_left"),
    "sliding window, either side": refusing(lambda call: call.window_left >= 0 and call.window_right >= 0),
    "grouped and single key heads": refusing(lambda call: call.group_size > 1),
    "packed sequences (cu_seqlens)": refusing(_any, VarlenCall),
    "packed documents in a dense batch (segment ids)": refusing(lambda call: call.query_segments is not None),
    "padded batch (key lengths)": refusing(lambda call: call.key_lengths is not None),
    "key/value cache with append and rotary": refusing(lambda call: call.rotary_cos is not None, KVCacheCall),
    "paged cache, any page size": refusing(lambda call: call.block_table is not None, KVCacheCall),
    "decoding split over keys": refusing(lambda call: call.num_splits > 1, KVCacheCall),
    "ALiBi, with the slopes' gradient": refusing_gradient("alibi_slopes"),
    "softcap": refusing(lambda call: call.softcap),
    "additive bias of any broadcast shape and layout": refusing(lambda call: call.bias is not None),
    "gradient of the bias": refusing_gradient("bias"),
    "boolean mask": refusing(lambda call: call.mask is not None),
    "learned sinks, with gradient": refusing_gradient("sinks"),
    "dropout": refusing(lambda call: call.dropout_p),
    "one dropout mask for a seed, whatever runs": _another_mask,
    "log-sum-exp returned": refusing_option("return_lse"),
    "gradient through the log-sum-exp": wrapping(("attention_bwd",), _without_dlse),
    "attention weights returned, with gradient": wrapping(("attention_weights_fwd",), _refuse),
    "fully masked rows give 0 and no NaN": wrapping(("attention_fwd",), _nan_in_empty_rows),
    "backward gives the same bits on every run": wrapping(
        ("attention_bwd", "varlen_bwd"), _other_bits_each_run
    ),
    "a sequence gives the same bits alone and in a batch": wrapping(
        ("attention_fwd",), _other_bits_in_a_batch
    ),
    "second derivatives": refusing(_in_a_backward_that_is_differentiated),
    "forward-mode derivatives (jvp)": refusing(_under_a_transform),
    "vmap": refusing(_under_a_transform),
    "torch.compile without breaks": _breaking_the_graph,
    "CUDA graphs": wrapping(("varlen_fwd", "varlen_bwd"), _length_leaves_the_device),
    "one compiled kernel for every length": refusing(_any),
    "offsets beyond 32 bits": refusing(_any),
    "says what runs and why not the others": _no_explanation,
    "CPU, with gradients": refusing(lambda call: call.query.device.type == "cpu"),
}


_outcomes: dict[str, dict[str, str]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool:
    """Run a test once without each of the features that name it, or its function."""
    names = {item.nodeid, item.nodeid.partition("[")[0]}
    for feature in FEATURES:
        of_row = _outcomes.setdefault(feature.name, {})
        named = names.intersection((*feature.torch.tests, *feature.triton.tests))
        named = {
            name for name in named if of_row.get(name) != "failed"
        }  # of a function's tests one is enough
        if not named or feature.name not in ABSENT:
            continue
        with pytest.MonkeyPatch.context() as patch:
            ABSENT[feature.name](patch)
            reports = runtestprotocol(item, log=False)
        found = {report.outcome for report in reports}
        became = next((outcome for outcome in ("failed", "skipped") if outcome in found), "passed")
        of_row.update(dict.fromkeys(named, became))
    return True


def pytest_sessionfinish() -> None:
    Path(os.environ[VARIABLE]).write_text(json.dumps(_outcomes), encoding="utf-8")
