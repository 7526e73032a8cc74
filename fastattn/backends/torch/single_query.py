"""One query per sequence and head, or a few: products of all keys with the queries that share them, for every key/value
head.

A batched matrix product gives a matrix the same bits at any place of the batch, except in a batch of one, which uses
other code; a single matrix is therefore given twice. In torch's fused kernel with several threads a float32 product of
one row does not have this property: each thread's scratch buffer follows the previous one's, so the alignment, on which
such products depend, differs between threads. Otherwise the kernel is used where it is faster, because it starts fewer
operations: on processors for which MKL's products are made, and with one thread on others where keys are few.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.fused import is_regular
from fastattn.spec import AttentionSpec, accumulation_dtype

WIDENED_ELEMENTS = 2**18  # of a float32 copy of keys or values: what stays in a core's cache
FEW_ELEMENTS = 2**17  # of the keys of one sequence; with fewer, the cost of starting an operation matters
MOST_QUERIES = 16  # per head; more queries run in tiles
MOST_SCORES = 2**22  # of one sequence with several queries, whose scores are all in memory at once
# head dim from which MKL reads long float32 keys faster as the first operand, except on processors of its maker
KEYS_FIRST_MIN_DIM = 128
# the operand of baddbmm that a beta of 0 leaves unread
_NOTHING = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def can_run(spec: AttentionSpec) -> bool:
    """Whether a call has one query per head and nothing that changes its scores one by one."""
    return spec.single_query and keeps_scores(spec)


def keeps_scores(spec: AttentionSpec) -> bool:
    """Whether a CPU call has nothing that changes its scores one by one; a window may cut them."""
    changed = spec.mask or spec.bias or spec.segments or spec.alibi or spec.softcap or spec.dropout
    return spec.device == "cpu" and not changed


def tiles(spec: AttentionSpec) -> str:
    """What computes one query with the threads that there are now."""
    several, wide = torch.get_num_threads() > 1, accumulation_dtype(spec.dtype)
    most = most_fused_keys(1, spec.group_size, spec.head_dim, spec.value_dim, spec.dtype, 1.0, several)
    if not most and wide != spec.dtype:  # few elements are widened
        widened = most_fused_keys(1, spec.group_size, spec.head_dim, spec.value_dim, wide, 1.0, several)
        most = min(widened, FEW_ELEMENTS // spec.head_dim)
    products, kernel = "matrix products with all keys", "torch's fused CPU kernel"
    if not most:
        return f"one query: {products}"
    if most == sys.maxsize:
        return f"one query: {kernel}"
    return f"one query: {kernel} with one thread up to {most} keys of all key heads, beyond {products}"


def are_few(num_heads: int, queries: int, keys: int, causal: bool) -> bool:
    """Whether queries of one sequence are few enough for one product; each must see a key. Independent of the batch
    size, so that a sequence has the same bits in any batch."""
    return (
        queries <= MOST_QUERIES
        and (queries <= keys or not causal)
        and (queries == 1 or num_heads * queries * keys <= MOST_SCORES)
    )


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
    out, lse = results(query, key, value, scale, exact_scores)
    assert lse is not None
    return out, lse


def results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    exact_scores: bool,
    causal: bool = False,
    wants_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of queries that `are_few`: (B, H, Sq, Dv) and (B, H, Sq), contiguous.

    Arguments are those of `single_query`, and
    causal: of several queries the last sees every key, and each earlier one a key less.
    wants_lse: None for lse where it is False; out has the same bits.
    """
    batch, num_heads, count, head_dim = query.shape
    num_kv_heads, seqlen, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group_size = num_heads // num_kv_heads
    dtype = query.dtype
    wide = accumulation_dtype(dtype)
    elements = num_kv_heads * seqlen * head_dim
    out: Tensor
    lse: Tensor | None
    apart, several = False, torch.get_num_threads() > 1
    if count == 1 and seqlen <= most_fused_keys(
        num_kv_heads, group_size, head_dim, value_dim, dtype, scale, several
    ):
        rows = query.reshape(batch, num_kv_heads, group_size, head_dim)
        out, row_lse = fused_rows(rows, key, value, scale)
        if is_regular(row_lse):
            out = out.reshape(batch, num_heads, 1, head_dim).contiguous()
            return out, row_lse.reshape(batch, num_heads, 1).contiguous() if wants_lse else None
        apart = True  # sequences with regular rows keep the bits they would have in another batch
    elif dtype != wide and elements <= FEW_ELEMENTS:
        # starting a product in 16 bits takes longer than widening so few elements
        sequences = max(1, WIDENED_ELEMENTS // elements)
        few = []
        for first in range(0, batch, sequences):
            q, k, v = (t[first : first + sequences].to(wide) for t in (query, key, value))
            few.append(results(q, k, v, scale, exact_scores, causal, wants_lse))
        out, lse = _joined(few)
        return out.to(dtype), lse
    if batch > 1 and (
        apart or halves(num_kv_heads, elements) or not (batch_merges(key) and batch_merges(value))
    ):
        each = [
            results(
                query[b : b + 1], key[b : b + 1], value[b : b + 1], scale, exact_scores, causal, wants_lse
            )
            for b in range(batch)
        ]
        return _joined(each)
    groups = batch * num_kv_heads  # one for each key/value head of each sequence
    queries = query.reshape(groups, group_size * count, head_dim)
    out, lse = products(
        queries, merged(key), merged(value), scale, elements, exact_scores, count if causal else 1, wants_lse
    )
    out = out.view(batch, num_heads, count, value_dim)
    return out, None if lse is None else lse.view(batch, num_heads, count)


def fused_rows(
    rows: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows (B, Hkv, n, D), which all see every key, by torch's fused kernel: (B, Hkv, n, D) and
    (B, Hkv, n). A row that is not regular may be wrong.

    The bits of a sequence are those that it has alone where `keeps_bits`.

    Args:
        mask: additive, (B, 1, 1, S) in the dtype of the rows; None = none.
    """
    batch, num_kv_heads = rows.shape[:2]
    if batch * num_kv_heads != 1 or torch.get_num_threads() == 1:
        return torch_compat.cpu_flash_attention(rows, key, value, False, mask, scale)
    # MKL would share the product of a lone matrix among all threads
    q, k, v = (t.expand(2, -1, -1, -1) for t in (rows, key, value))
    mask = None if mask is None else mask.expand(2, -1, -1, -1)
    out, lse = torch_compat.cpu_flash_attention(q, k, v, False, mask, scale)
    return out[:1], lse[:1]


def keeps_bits(
    group_size: int, head_dim: int, value_dim: int, dtype: torch.dtype, scale: float, several_threads: bool
) -> bool:
    """Whether `fused_rows` gives a sequence the bits that it has alone, within the error rule, and is fast.

    So it is by the products that MKL makes for its maker's processors: for rows that share a key/value head, for one
    row in 16 bits, and for one in float32 with one thread.
    """
    if not torch_compat.has_mkl_on_intel() or not _fused_runs(head_dim, value_dim, scale):
        return False
    if dtype != accumulation_dtype(dtype):
        return torch_compat.has_fast_products(dtype)
    return group_size > 1 or not several_threads


def has_fast_masks(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether one query under a mask of the keys runs in torch's fused kernel, and that is fast in a dtype."""
    exact = dtype == accumulation_dtype(dtype)
    fast = exact or (torch_compat.has_mkl_on_intel() and torch_compat.has_fast_products(dtype))
    return fast and _fused_runs(head_dim, head_dim, 1.0)


def _fused_runs(head_dim: int, value_dim: int, scale: float) -> bool:
    of_kernel = head_dim == value_dim and head_dim % 8 == 0 and scale > 0
    return of_kernel and torch_compat.has_cpu_flash_attention(backward=False)


def in_one_product(key: Tensor, value: Tensor, dtype: torch.dtype, elements: int) -> bool:
    """Whether `results` gives a batch to `products` as a whole, where no kernel of one thread takes it."""
    few = dtype != accumulation_dtype(dtype) and elements <= FEW_ELEMENTS
    if few or key.shape[0] == 1:
        return not few
    return not halves(key.shape[1], elements) and batch_merges(key) and batch_merges(value)


def merged(tensor: Tensor) -> Tensor:
    """(B, Hkv, S, D) with unit last stride, whose batch and heads are one dimension to a view, as (B * Hkv, S, D)."""
    batch, heads, seqlen, dim = tensor.shape
    of_batch, of_head, of_row, _ = tensor.stride()
    return tensor.as_strided((batch * heads, seqlen, dim), (of_head if heads > 1 else of_batch, of_row, 1))


def halves(num_kv_heads: int, elements: int) -> bool:
    """Whether the queries of a single key/value head are split into two matrices, one for each of two threads."""
    return num_kv_heads == 1 and elements > FEW_ELEMENTS


def products(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    elements: int,
    exact_scores: bool,
    count: int,
    wants_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of `results`, (n, rows, Dv) and (n, rows), by products for n key/value heads of all sequences.

    Args:
        queries: (n, group * Sq, D), contiguous.
        keys, values: (n, S, D) and (n, S, Dv).
        elements: of the keys of one sequence.
        count: Sq, of causal queries; 1 where each sees every key.
    """
    dtype, head_dim = queries.dtype, queries.shape[2]
    wide = accumulation_dtype(dtype)
    keys_first = (
        head_dim >= KEYS_FIRST_MIN_DIM and elements > FEW_ELEMENTS and not torch_compat.has_mkl_on_intel()
    )
    if dtype == wide:
        return _products(queries, keys, values, scale, keys_first, count, wants_lse)
    if not exact_scores and torch_compat.has_fast_products(dtype):
        return _products(queries, keys, values, scale, True, count, wants_lse)
    step = max(1, WIDENED_ELEMENTS // (keys.shape[1] * max(head_dim, values.shape[2])))
    parts = [
        _products(
            queries[first : first + step].to(wide),
            keys[first : first + step].to(wide),
            values[first : first + step].to(wide),
            scale,
            keys_first,
            count,
            wants_lse,
        )
        for first in range(0, queries.shape[0], step)
    ]
    out, lse = _joined(parts)
    return out.to(dtype), lse


def _joined(results: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    if len(results) == 1:
        return results[0]
    lses = [lse for _, lse in results if lse is not None]
    return torch.cat([out for out, _ in results]), torch.cat(lses) if lses else None


def most_fused_keys(
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    scale: float,
    several_threads: bool,
) -> int:
    """The most keys for which torch's fused kernel runs; 0 where its error may be too large, or a sequence's bits would
    depend on the batch. Independent of the batch size."""
    if torch_compat.has_mkl_on_intel():
        kept = keeps_bits(group_size, head_dim, value_dim, dtype, scale, several_threads)
        return sys.maxsize if kept else 0
    exact = dtype == accumulation_dtype(dtype)
    if several_threads or not exact or not _fused_runs(head_dim, value_dim, scale):
        return 0
    shared = group_size > 1 and head_dim < KEYS_FIRST_MIN_DIM
    return sys.maxsize if shared else FEW_ELEMENTS // (num_kv_heads * head_dim)


def _products(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    keys_first: bool,
    count: int,
    wants_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    n, rows, _ = queries.shape
    seqlen = keys.shape[1]
    if n == 1:
        if rows % 2 == 0 and seqlen * queries.shape[2] > FEW_ELEMENTS:
            halved = queries.view(2, rows // 2, -1)
            keys, values = (t.expand(2, -1, -1) for t in (keys, values))
            out, lse = _products(halved, keys, values, scale, keys_first, count, wants_lse)
            return out.view(1, rows, -1), None if lse is None else lse.view(1, rows)
        # the same matrix twice: a batch of one would use other code, and two threads take no longer for two
        queries, keys, values = (t.expand(2, -1, -1) for t in (queries, keys, values))
        out, lse = _products(queries, keys, values, scale, keys_first, count, wants_lse)
        return out[:1], None if lse is None else lse[:1]
    dtype = queries.dtype
    wide = accumulation_dtype(dtype)
    first, second = (keys, queries.mT) if keys_first else (queries, keys.mT)
    scaled = scale != 0 and dtype == wide
    if scaled:
        scores = torch.baddbmm(_NOTHING[wide], first, second, beta=0, alpha=scale)
    else:
        scores = torch.bmm(first, second)
    if keys_first:
        scores = scores.mT.to(wide, memory_format=torch.contiguous_format).contiguous()
    if not scaled:
        scores = scores.mul_(scale)
    if count > 1:
        last = scores.view(-1, count, seqlen).narrow(2, seqlen - count, count)
        last.masked_fill_(_later(count), -torch.inf)
    probs = torch.softmax(scores, -1)
    out = torch.bmm(probs if dtype == wide else probs.to(dtype), values)
    largest = lse = None
    if wants_lse:
        largest = scores.amax(-1)
        lse = largest - probs.amax(-1).log_()  # the largest weight is exp(0) / sum
    # a row with a NaN, a score of +inf, or scores of -inf alone, which has no weight, is NaN in every column
    if math.isnan((out if out.shape[2] else probs).sum().item()):
        largest = scores.amax(-1) if largest is None else largest
        unseen = largest == -torch.inf
        out = out.masked_fill(unseen[..., None], 0)
        lse = None if lse is None else lse.masked_fill(unseen, -torch.inf)
    return out, lse


@lru_cache(maxsize=MOST_QUERIES)
def _later(count: int) -> Tensor:
    """Which of the last `count` keys come after each of as many queries, (count, count)."""
    with torch.inference_mode(False):
        return torch.ones(count, count, dtype=torch.bool, device="cpu").triu_(1)


def batch_merges(tensor: Tensor) -> bool:
    """Whether batch and heads are one dimension to a view."""
    return tensor.stride(0) == tensor.shape[1] * tensor.stride(1) or tensor.shape[1] == 1
