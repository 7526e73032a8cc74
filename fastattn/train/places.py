"""Where the items of a task's training set come from, for errors that name them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

from fastattn.tasks import classify, dpo, embed, qa, seq2seq, tag
from fastattn.train.prepared import Prepared

ONE_EACH = (classify, tag, seq2seq, embed, dpo)  # tasks whose item is an example
SHOWN_TOKENS = 16  # of a row that holds parts of documents


def place_of(prepared: Prepared) -> Callable[[int], str]:
    """A function from an item's index to its example's file and line; of packed rows, to the text they begin with."""
    examples = prepared.data.train
    if prepared.task in ONE_EACH:
        return lambda index: str(examples[index].where)
    if prepared.task is qa:

        @cache
        def first_windows() -> list[int]:
            windows = qa.windows_of(prepared.model, prepared.tokenizer, examples, prepared.data.options)
            return list(accumulate(map(len, windows), initial=0))

        return lambda index: str(examples[bisect_right(first_windows(), index) - 1].where)
    return lambda index: f"begins with {_beginning(prepared.train_set[index], prepared.tokenizer)!r}"


def _beginning(item: Any, tokenizer: Any) -> str:
    """The text of the first tokens of a packed row or a passage."""
    ids = item["input_ids"] if isinstance(item, dict) else item.ids
    text: str = tokenizer.core.decode([int(token) for token in ids[:SHOWN_TOKENS]])
    return " ".join(text.split())
