"""One query per sequence and head: products of all keys with the queries that share them, for every key/value head.

With several threads the bits of torch's fused kernel depend on a sequence's place in its batch, and in 16 bits it is
several times slower than these products. A product of the keys with the queries, not of the queries with the keys, has
the same bits in every batch. One thread runs the fused kernel in float32, which starts fewer operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.fused import is_regular
from fastattn.spec import AttentionSpec, accumulation_dtype

WIDENED_ELEMENTS = 2**18  # of a float32 copy of keys or values: what stays in a core's cache


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
    batch, num_heads, _, head_dim = query.shape
    if _fused_is_invariant(query, value) and scale > 0:
        rows = query.reshape(batch, key.shape[1], num_heads // key.shape[1], head_dim)
        out, lse = torch_compat.cpu_flash_attention(rows, key, value, False, None, scale)
        if is_regular(lse):
            return out.reshape(batch, num_heads, 1, head_dim), lse.reshape(batch, num_heads, 1)
        apart = True  # those of the batch that are regular keep their bits
    else:
        apart = not (_batch_merges(key) and _batch_merges(value))
    if batch > 1 and apart:
        each = [
            single_query(query[b : b + 1], key[b : b + 1], value[b : b + 1], scale, exact_scores)
            for b in range(batch)
        ]
        return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])
    groups = batch * key.shape[1]  # one for each key/value head of each sequence
    queries = query.reshape(groups, num_heads // key.shape[1], head_dim)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    dtype = query.dtype
    wide = accumulation_dtype(dtype)
    if dtype == wide or (not exact_scores and torch_compat.has_fast_products(dtype)):
        out, lse = _products(queries, keys, values, scale, wide)
    else:
        step = max(1, WIDENED_ELEMENTS // (keys.shape[1] * max(head_dim, values.shape[2])))
        parts = [
            _products(
                queries[first : first + step].to(wide),
                keys[first : first + step].to(wide),
                values[first : first + step].to(wide),
                scale,
                wide,
            )
            for first in range(0, groups, step)
        ]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(results) for results in zip(*parts))
        out = out.to(dtype)
    return out.view(batch, num_heads, 1, values.shape[2]), lse.view(batch, num_heads, 1)


def _fused_is_invariant(query: Tensor, value: Tensor) -> bool:
    """Whether torch's fused kernel has the same bits in every batch here, and holds the error rule."""
    dim = query.shape[3]
    return (
        torch.get_num_threads() == 1
        and query.dtype in (torch.float32, torch.float64)
        and dim == value.shape[3]
        and dim % 8 == 0
        and torch_compat.has_cpu_flash_attention(backward=False)
    )


def _products(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out (n, group, Dv), lse (n, group)) of queries (n, group, D), keys (n, S, D) and values (n, S, Dv)."""
    scores = torch.bmm(keys, queries.mT).mT.to(wide, memory_format=torch.contiguous_format)
    scores = scores.contiguous().mul_(scale)
    largest = scores.amax(-1)
    probs = torch.softmax(scores, -1)
    lse = largest - probs.amax(-1).log_()  # the largest weight is exp(0) / sum
    out = torch.bmm(probs.to(values.dtype), values)
    lowest = lse.min().item()
    if lowest != lowest:  # NaN: a score was NaN or +inf, or a row has only scores of -inf and so no weight
        unseen = largest == -torch.inf
        out, lse = out.masked_fill(unseen[..., None], 0), lse.masked_fill(unseen, -torch.inf)
    return out, lse


def _batch_merges(tensor: Tensor) -> bool:
    """Whether batch and heads are one dimension to a view."""
    return tensor.stride(0) == tensor.shape[1] * tensor.stride(1) or tensor.shape[1] == 1
