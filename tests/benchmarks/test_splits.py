"""The model of splits over queries, and the table made of it."""

from __future__ import annotations

import checkout
from measure import decode_splits, splits


def test_the_table_of_the_docs_is_that_of_the_script() -> None:
    lines = (checkout.ROOT / "docs" / "hopper.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(splits.HEADER[0])
    made = splits.table()
    assert lines[start : start + len(made)] == made, "run: python benchmarks/splits.py"
    assert lines[start + len(made)] == ""


def test_the_table_of_decoding_is_that_of_the_script() -> None:
    lines = (checkout.ROOT / "docs" / "decode.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(decode_splits.HEADER[0])
    made = decode_splits.table()
    assert lines[start : start + len(made)] == made, "run: python benchmarks/splits.py"
    assert lines[start + len(made)] == ""


def test_tasks_start_on_the_processor_that_is_free_first() -> None:
    assert splits.makespan([3, 3, 4], 2) == 7
    assert splits.makespan([4, 3, 3], 2) == 6
    assert splits.makespan([5], 3) == 5


def test_splits_share_out_every_visit() -> None:
    """Whatever the split, all pairs of a query block and a key block are visited once by each head."""
    call = splits.Call(heads=8, seqlen=1024)
    blocks, keys = call.seqlen // splits.BLOCK_M, call.seqlen // splits.BLOCK_N
    for causal in (False, True):
        seen = [
            1 for j in range(keys) for i in range(blocks)
            if not causal or (i + 1) * splits.BLOCK_M > j * splits.BLOCK_N
        ]  # fmt: skip
        for heads, queries in ((8, 0), (4, 0), (2, 256)):
            assert sum(splits.programs(call, heads, queries, causal)) == call.heads * len(seen)
