"""Best-fit packing: no piece torn or lost, rows as full as the rule makes them, and the loss of pieces one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import small_models
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.constants import IGNORE_INDEX
from fastattn.data.best_fit import BestFitDataset, best_fit, packed_sequences
from fastattn.data.packing import PADDING_SEGMENT, TokenStream
from fastattn.models import GPT, GPTConfig


def slow_best_fit(lengths: list[int], size: int) -> list[int]:
    """The room that each row is left with, by the rule said plainly."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(size - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 70), max_size=60))
def test_rows_are_those_of_the_rule(lengths: list[int]) -> None:
    placed, begins = best_fit(lengths, 70)
    assert sorted(placed.tolist()) == list(range(len(lengths)))
    rows = [placed[a:b] for a, b in pairwise(begins)]
    assert all(len(row) for row in rows)
    assert sorted(70 - sum(lengths[i] for i in row) for row in rows) == slow_best_fit(lengths, 70)


def stream(lengths: list[int], seed: int = 0) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(2, small_models.VOCAB, sum(lengths)).astype(np.uint16)
    return TokenStream(tokens, np.cumsum([0, *lengths[:-1]], dtype=np.int64))


@pytest.mark.parametrize("bos", [None, 1])
def test_every_token_of_a_stream_is_in_one_row(bos: int | None) -> None:
    documents = stream([5, 30, 1, 16, 9, 2, 15])
    data = BestFitDataset.of_stream(documents, 16, bos_id=bos)
    seen = []
    for row in data:
        ids, labels, segments = (row[name].numpy() for name in ("input_ids", "labels", "segment_ids"))
        last = segments.max()
        assert ((segments == PADDING_SEGMENT) == (np.arange(16) >= (segments >= 0).sum())).all()
        for segment in range(last + 1):
            piece, targets = ids[segments == segment], labels[segments == segment]
            assert targets[0] == IGNORE_INDEX
            assert (targets[1:] == piece[1:]).all()
            assert bos is None or piece[0] == bos
            seen.extend(piece[bos is not None :].tolist())
    alone = 1 if bos is None else 0  # the document of one token, which nothing predicts
    assert (data.dropped, len(seen)) == (alone, len(documents) - alone)
    assert sorted(seen) == sorted(np.delete(documents.tokens, 35 if alone else []).tolist())
    assert data.num_targets() == sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in data)
    assert data.padding == pytest.approx(np.mean([(row["segment_ids"] < 0).float().mean() for row in data]))


@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi", "gqa, window, qk_norm"])
def test_the_loss_of_rows_is_that_of_their_pieces(kind: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**small_models.GPT2, **small_models.KINDS[kind]})).double().eval()
    data = BestFitDataset.of_stream(stream([5, 30, 3, 16, 9, 2, 15]), 24, bos_id=1)
    rows = [data[i] for i in range(len(data))]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    packed = model(**batch).loss
    total, count = 0.0, 0
    for i in range(len(data)):
        for ids, labels in data.pieces_of(i):
            loss = model(torch.from_numpy(ids)[None], labels=torch.from_numpy(labels)[None]).loss
            total, count = total + loss.item() * (len(ids) - 1), count + len(ids) - 1
    assert count == data.num_targets()
    assert packed.item() == pytest.approx(
        total / count, rel=torch.finfo(torch.float32).eps
    )  # each loss is a float32


def test_marked_tokens_count_alone() -> None:
    data = packed_sequences(
        [([5, 6, 7], [True, False, True]), ([8, 9], [True, False]), ([4], [True])], 8, dropped=3
    )
    row = data[0]
    assert row["labels"].tolist()[:3] == [IGNORE_INDEX, IGNORE_INDEX, 7]
    assert (len(data), data.num_targets(), data.dropped) == (1, 1, 3 + 2 + 1)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^lengths"):
        best_fit([3, 9], 8)
    with pytest.raises(ValueError, match=r"^lengths"):
        best_fit([0], 8)
    with pytest.raises(ValueError, match=r"^spans: a piece takes 9"):
        BestFitDataset(np.arange(9), np.array([[0, 9]]), 8)
    with pytest.raises(ValueError, match=r"^spans: no piece"):
        BestFitDataset(np.arange(9), np.array([[0, 1]]), 8)
    with pytest.raises(ValueError, match=r"^block_size"):
        BestFitDataset.of_stream(stream([5]), 1)
    with pytest.raises(IndexError, match=r"^index"):
        BestFitDataset.of_stream(stream([5]), 8)[1]
