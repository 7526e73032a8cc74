"""One query per sequence and head: products of all keys with the queries that share them, for every key/value head.

A batched matrix product gives a matrix the same bits at any place of the batch, except in a batch of one, which uses
other code; a single matrix is therefore given twice. torch's fused kernel does not have this property with several
threads: each thread's scratch buffer follows the previous one's, so the alignment, on which products of few rows
depend, differs between threads. With one thread it is used where keys are few or shared, as it starts fewer operations.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.fused import is_regular
from fastattn.spec import AttentionSpec, accumulation_dtype

WIDENED_ELEMENTS = 2**18  # of a float32 copy of keys or values: what stays in a core's cache
FEW_ELEMENTS = 2**17  # of the keys of one sequence, up to which it matters what starting an operation costs
KEYS_FIRST_MIN_DIM = 128  # head dim from which MKL reads long float32 keys faster as the first operand
# the operand of baddbmm that a beta of 0 leaves unread
_NOTHING = {dtype: torch.empty((), dtype=dtype) for dtype in (torch.float32, torch.float64)}


def can_run(spec: AttentionSpec) -> bool:
    """Whether a call has one query per head and nothing that changes its scores one by one."""
    changed = spec.mask or spec.bias or spec.segments or spec.alibi or spec.softcap or spec.dropout
    return spec.single_query and spec.device == "cpu" and not changed


def single_query(
    query: Tensor, key: Tensor, value: Tensor, scale: float, exact_scores: bool = True
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a query that sees every key, in at least one.

    Args:
        query: (B, H, 1, D).
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv) with unit last strides; S is 1 or more.
        exact_scores: keep scores in the accumulation dtype, as a gradient that is computed from lse needs. Otherwise
            they are rounded to bfloat16 where that makes the products faster.

    Returns:
        out (B, H, 1, Dv) and lse (B, H, 1), contiguous.
    """
    out, lse = _results(query, key, value, scale, exact_scores, wants_lse=True)
    assert lse is not None
    return out, lse


def single_query_out(query: Tensor, key: Tensor, value: Tensor, scale: float, exact_scores: bool) -> Tensor:
    """The first result of `single_query`, with the same bits."""
    return _results(query, key, value, scale, exact_scores, wants_lse=False)[0]


def _results(
    query: Tensor, key: Tensor, value: Tensor, scale: float, exact_scores: bool, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, seqlen, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group_size = num_heads // num_kv_heads
    dtype = query.dtype
    wide = accumulation_dtype(dtype)
    elements = num_kv_heads * seqlen * head_dim
    out: Tensor
    lse: Tensor | None
    if dtype != wide and elements <= FEW_ELEMENTS:
        # a product in 16 bits takes longer to start than to widen so few
        count = max(1, WIDENED_ELEMENTS // elements)
        few = []
        for first in range(0, batch, count):
            q, k, v = (t[first : first + count].to(wide) for t in (query, key, value))
            few.append(_results(q, k, v, scale, exact_scores, wants_lse))
        out, lse = _joined(few)
        return out.to(dtype), lse
    most_fused = most_fused_keys(num_kv_heads, group_size, head_dim, value_dim, query.dtype, scale)
    apart = False
    if seqlen <= most_fused and torch.get_num_threads() == 1:
        rows = query.reshape(batch, num_kv_heads, group_size, head_dim)
        out, row_lse = torch_compat.cpu_flash_attention(rows, key, value, False, None, scale)
        if is_regular(row_lse):
            if group_size > 1:
                out = out.reshape(batch, num_heads, 1, head_dim)
            return out, row_lse.reshape(batch, num_heads, 1)
        apart = True  # those of the batch that are regular keep their bits
    if batch > 1 and (apart or not (_batch_merges(key) and _batch_merges(value))):
        each = [
            _results(query[b : b + 1], key[b : b + 1], value[b : b + 1], scale, exact_scores, wants_lse)
            for b in range(batch)
        ]
        return _joined(each)
    groups = batch * num_kv_heads  # one for each key/value head of each sequence
    queries = query.reshape(groups, group_size, head_dim)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    keys_first = head_dim >= KEYS_FIRST_MIN_DIM and elements > FEW_ELEMENTS
    if dtype == wide:
        out, lse = _products(queries, keys, values, scale, keys_first, wants_lse)
    elif not exact_scores and torch_compat.has_fast_products(dtype):
        out, lse = _products(queries, keys, values, scale, True, wants_lse)
    else:
        step = max(1, WIDENED_ELEMENTS // (seqlen * max(head_dim, value_dim)))
        parts = [
            _products(
                queries[first : first + step].to(wide),
                keys[first : first + step].to(wide),
                values[first : first + step].to(wide),
                scale,
                keys_first,
                wants_lse,
            )
            for first in range(0, groups, step)
        ]
        out, lse = _joined(parts)
        out = out.to(dtype)
    return out.view(batch, num_heads, 1, value_dim), None if lse is None else lse.view(batch, num_heads, 1)


def _joined(results: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    if len(results) == 1:
        return results[0]
    lses = [lse for _, lse in results if lse is not None]
    return torch.cat([out for out, _ in results]), torch.cat(lses) if lses else None


def most_fused_keys(
    num_kv_heads: int, group_size: int, head_dim: int, value_dim: int, dtype: torch.dtype, scale: float
) -> int:
    """Up to how many keys one thread runs torch's fused kernel, where that keeps the error rule; no number depends on
    the batch."""
    if (
        dtype not in (torch.float32, torch.float64)
        or head_dim != value_dim
        or head_dim % 8
        or not scale > 0
        or not torch_compat.has_cpu_flash_attention(backward=False)
    ):
        return 0
    shared = group_size > 1 and head_dim < KEYS_FIRST_MIN_DIM
    return sys.maxsize if shared else FEW_ELEMENTS // (num_kv_heads * head_dim)


def _products(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, keys_first: bool, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out (n, group, Dv), lse (n, group)) of queries (n, group, D), keys (n, S, D) and values (n, S, Dv)."""
    if queries.shape[0] == 1:  # two threads take no longer for two
        queries, keys, values = (t.expand(2, -1, -1) for t in (queries, keys, values))
        out, lse = _products(queries, keys, values, scale, keys_first, wants_lse)
        return out[:1], None if lse is None else lse[:1]
    wide = accumulation_dtype(queries.dtype)
    first, second = (keys, queries.mT) if keys_first else (queries, keys.mT)
    if scale == 0 or queries.dtype != wide:
        scores = torch.bmm(first, second)
    else:
        scores = torch.baddbmm(_NOTHING[wide], first, second, beta=0, alpha=scale)
    if keys_first:
        scores = scores.mT.to(wide, memory_format=torch.contiguous_format).contiguous()
    if scale == 0 or queries.dtype != wide:
        scores = scores.mul_(scale)
    probs = torch.softmax(scores, -1)
    out = torch.bmm(probs.to(values.dtype), values)
    largest = lse = None
    if wants_lse:
        largest = scores.amax(-1)
        lse = largest - probs.amax(-1).log_()  # the largest weight is exp(0) / sum
    # a row with a NaN, a score of +inf, or scores of -inf alone, which has no weight, is NaN in every column
    if math.isnan(probs.select(-1, 0).sum().item()):
        largest = scores.amax(-1) if largest is None else largest
        unseen = largest == -torch.inf
        out = out.masked_fill(unseen[..., None], 0)
        lse = None if lse is None else lse.masked_fill(unseen, -torch.inf)
    return out, lse


def _batch_merges(tensor: Tensor) -> bool:
    """Whether batch and heads are one dimension to a view."""
    return tensor.stride(0) == tensor.shape[1] * tensor.stride(1) or tensor.shape[1] == 1
