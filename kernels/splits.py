"""How dk and dv are split over queries where there are too few key/value heads to fill a GPU.

Nothing here depends on the batch, on the keys or on the device: a sequence gives the same bits alone and in a batch.
The number of splits follows from the length of the queries, and adding up splits without queries changes no bit.
"""

from __future__ import annotations

from typing import NamedTuple

from fastattn.integers import cdiv
from fastattn.spec import AttentionSpec

SPLIT_ROWS = 32  # keys that a program of sum_splits_kernel adds up
WORKSPACE_BYTES = 256 * 2**20  # of float32 sums, or those of two splits where that is more


class Split(NamedTuple):
    """The share of the queries of a key/value head that one program takes."""

    heads: int  # of the query heads of a group; 0: nothing is split
    queries: int = 0  # of their queries, a multiple of every tile's; 0: all

    def __str__(self) -> str:
        queries = f" and {self.queries} queries" if self.queries else ""
        return f"sums of {self.heads} heads{queries} added up"


WHOLE = Split(0)
FEW_KV_HEADS = Split(heads=4, queries=4096)


def split_of(spec: AttentionSpec, packed: bool) -> Split:
    """The split of a call. Packed sequences keep their queries together: their lengths are on the device."""
    if not spec.few_kv_heads:
        return WHOLE
    return FEW_KV_HEADS._replace(queries=0) if packed else FEW_KV_HEADS


def split_count(split: Split, group_size: int, seqlen_q: int) -> int:
    """How many splits there are; with 1 the result of the kernel is that of the whole."""
    heads = cdiv(group_size, split.heads) if split.heads else 1
    return heads * max(1, cdiv(seqlen_q, split.queries)) if split.queries else heads


def splits_at_once(count: int, bytes_of_one: int) -> int:
    """How many splits' sums the workspace holds, at least two: the first is the sum of all splits before."""
    return max(2, min(count, WORKSPACE_BYTES // max(1, bytes_of_one)))
