"""The checks of memory and values that `attention_kv_cache` makes in every call, and plans of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import layout
from fastattn.backends.replay import Replay, can_replay
from fastattn.ops import arguments
from fastattn.ops.overlap import overlap, overlaps_itself
from fastattn.spec import AttentionSpec, KVCacheCall
from fastattn.strides import last_offset

TENSORS = [field.name for field in fields(KVCacheCall) if "Tensor" in str(field.type)]  # the first fields


def check_memory(call: KVCacheCall) -> None:
    """Refuse outputs that overlap themselves or an input. Looks at addresses and strides only."""
    if call.key is None or call.value is None or not call.key.numel() + call.value.numel():
        return
    caches = (("k_cache", call.k_cache), ("v_cache", call.v_cache))
    for name, cache in caches:
        if overlaps_itself(cache):
            got = f"shape {arguments.shape_of(cache)} with strides {cache.stride()}"
            raise arguments.OverlapError(
                f"{name}: got {got}, where elements share memory, needs a place for each to append; clone() it"
            )
    if overlap(call.k_cache, call.v_cache):
        raise arguments.OverlapError(
            "v_cache: got memory of k_cache, needs its own to append to; clone() one of them"
        )
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        for written, cache in caches:
            if overlap(tensor, cache):
                raise arguments.OverlapError(
                    f"{name}: got memory of {written}, which is written to, needs its own; clone() it"
                )


def check_values(call: KVCacheCall) -> None:
    """Check values before anything is written; on a CPU, where it costs no synchronisation."""
    if call.query.device.type != "cpu" or call.cache_lengths.numel() == 0:
        return
    lengths = call.cache_lengths.tolist()
    shortest, longest = min(lengths), max(lengths)
    if shortest < 0 or longest + call.new_keys > call.capacity:
        raise ValueError(
            f"cache_lengths: got values from {shortest} to {longest}, needs 0 to {call.capacity - call.new_keys}: "
            f"the cache holds {call.capacity} tokens and {call.new_keys} are appended"
        )
    if call.rotary_cos is not None:
        positions = call.rotary_cos.shape[0]
        first = shortest + call.new_keys - call.query.shape[2]
        if first < 0 or longest + call.new_keys > positions:
            raise ValueError(
                f"rotary_cos: got {positions} positions, needs positions {first} to {longest + call.new_keys - 1}"
            )
    if call.block_table is not None:
        page, pages = call.k_cache.shape[2], call.k_cache.shape[0]
        used = (
            torch.arange(call.block_table.shape[1], device="cpu") * page
            < (call.cache_lengths + call.new_keys)[:, None]
        )
        blocks = call.block_table[used]
        if blocks.numel():
            lowest, highest = (int(n) for n in torch.aminmax(blocks))
            if lowest < 0 or highest >= pages:
                raise ValueError(
                    f"block_table: got values from {lowest} to {highest}, needs 0 to {pages - 1}"
                )
        if call.new_keys:
            _check_pages_written(call, blocks, used)


def _check_pages_written(call: KVCacheCall, blocks: Tensor, used: Tensor) -> None:
    """A page that is appended to may have one place in the tables: another would read or write what is new there."""
    assert call.block_table is not None
    first_written = call.cache_lengths[:, None] // call.k_cache.shape[2]
    written = call.block_table[used & (torch.arange(used.shape[1], device="cpu") >= first_written)]
    shared = torch.bincount(blocks, minlength=1)[written] > 1
    if shared.any():
        page = int(written[shared][0])
        raise arguments.OverlapError(
            f"block_table: got page {page} in several places, needs it in one: new keys are appended to it"
        )


def spec_of(call: KVCacheCall) -> AttentionSpec:
    """The spec of a call against the whole cache."""
    return AttentionSpec.of(call.attending(call.query, call.k_cache, call.v_cache, call.alibi_slopes))


def _reach(tensor: Tensor | None) -> int:
    """Bytes from the first element of a tensor to the end of its last one."""
    if tensor is None or not tensor.numel():
        return 0
    return tensor.element_size() * (1 + last_offset(tensor))


class KVCachePlan:
    """One kind of call of `attention_kv_cache`: its spec, backend and options, without any tensor."""

    __slots__ = ("chosen", "last_start", "launch", "options", "reach", "replay", "return_lse", "spec")

    def __init__(self, args: tuple[Any, ...], backend: str, return_lse: bool) -> None:
        call = layout.operands(KVCacheCall(*args))
        self.return_lse, self.options = return_lse, args[len(TENSORS) :]
        self.spec = spec_of(call)
        self.chosen = backends.select(self.spec, backend, "kv_cache_fwd")
        self.launch: Any = None
        if call.query is args[0] and hasattr(self.chosen, "kv_cache_fwd_plan"):
            self.launch = self.chosen.kv_cache_fwd_plan(self.spec, call, return_lse)
        self.replay = Replay(self._run) if can_replay(self.chosen) else None
        self.last_start = call.capacity - call.new_keys
        self.reach = tuple(map(_reach, (call.k_cache, call.v_cache, args[0], call.key, call.value)))

    def runner(self) -> Callable[..., Any]:
        """The function of a call's tensors that gives its results: a short one where the backend has a launch."""
        return self._any_call if self.launch is None else self._of_equal_lengths

    def _of_equal_lengths(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, key: Tensor | None,
        value: Tensor | None,
    ) -> Any:  # fmt: skip
        lengths = cache_lengths.tolist()
        start = lengths[0]
        if (
            0 <= start <= self.last_start
            and lengths.count(start) == len(lengths)
            and (key is None or value is None or self._apart(k_cache, v_cache, query, key, value))
        ):
            results = self.launch(query, k_cache, v_cache, key, value, start)
            if results is not None:
                return results
        return self._any_call(query, k_cache, v_cache, cache_lengths, key, value)

    def _any_call(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, key: Tensor | None,
        value: Tensor | None, block_table: Tensor | None = None, rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
    ) -> Any:  # fmt: skip
        lengths = arguments.as_int32("cache_lengths", cache_lengths)
        if block_table is not None:
            block_table = arguments.as_int32("block_table", block_table)
        slopes = None if alibi_slopes is None else arguments.as_slopes(alibi_slopes, query.dtype)
        sinks = None if sinks is None else arguments.as_sinks(sinks, query.dtype)
        tensors = (
            query, k_cache, v_cache, lengths, key, value, block_table, rotary_cos, rotary_sin, slopes, sinks,
        )  # fmt: skip
        apart = key is None or value is None or self._apart(k_cache, v_cache, query, key, value)
        if self.replay is None or query.is_cpu or not apart:
            call = self._call(tensors)
            if not apart:
                check_memory(call)
            check_values(call)
        results = self._attend(call) if self.replay is None else self.replay(*tensors)
        return results if self.return_lse else results[0]

    def _call(self, tensors: tuple[Any, ...]) -> KVCacheCall:
        return layout.operands(KVCacheCall(*tensors, *self.options))

    def _run(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        return self._attend(self._call(tensors))

    def _attend(self, call: KVCacheCall) -> tuple[Tensor, Tensor]:
        """(out, lse) of a call that was checked."""
        out, lse = self.chosen.kv_cache_fwd(self.spec, layout.for_backend(self.chosen, call, self.spec))
        return out, lse

    def _apart(self, k_cache: Tensor, v_cache: Tensor, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the byte ranges of the caches overlap neither each other nor those of the tensors that are read, so
        that none shares an element. That a cache does not overlap itself is known from its strides."""
        of_k_cache, of_v_cache, of_query, of_key, of_value = self.reach
        k, v = k_cache.data_ptr(), v_cache.data_ptr()
        k_stop, v_stop = k + of_k_cache, v + of_v_cache
        if k < v_stop and v < k_stop:
            return False
        start = query.data_ptr()
        if (start < k_stop and k < start + of_query) or (start < v_stop and v < start + of_query):
            return False
        start = key.data_ptr()
        if (start < k_stop and k < start + of_key) or (start < v_stop and v < start + of_key):
            return False
        start = value.data_ptr()
        return not ((start < k_stop and k < start + of_value) or (start < v_stop and v < start + of_value))
