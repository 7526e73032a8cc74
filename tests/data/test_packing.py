"""Token streams, their blocks, and the order they are drawn in."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.packing import PADDING_SEGMENT, IndexSampler, PackedDataset, TokenStream, split
from fastattn.data.tokenization import train_bpe

DOCUMENTS = ["the first one\n", "a second, longer document\n", "", "third\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(DOCUMENTS, 280)


def stream_of(lengths):
    return TokenStream(
        np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    )


def test_stream_holds_each_document_and_its_end(tokenizer):
    stream = TokenStream.build(DOCUMENTS, tokenizer)
    expected = [[*tokenizer.encode(d), tokenizer.eos_id] for d in DOCUMENTS if d]
    assert stream.tokens.tolist() == [token for document in expected for token in document]
    assert stream.starts.tolist() == np.cumsum([0] + [len(e) for e in expected])[:-1].tolist()
    assert stream.tokens.dtype == np.uint16


def test_memory_mapped_stream_is_the_same(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fastattn.data.packing.ENCODE_CHARACTERS", 10)
    held = TokenStream.build(DOCUMENTS, tokenizer)
    mapped = TokenStream.build(iter(DOCUMENTS), tokenizer, tmp_path / "stream")
    assert isinstance(mapped.tokens, np.memmap)
    assert np.array_equal(held.tokens, mapped.tokens)
    assert np.array_equal(held.starts, mapped.starts)
    train, _ = split(mapped, 0.3)
    assert np.shares_memory(train.tokens, mapped.tokens)


def test_large_vocabularies_get_wider_tokens(tokenizer):
    class Wide:
        vocab_size, eos_id = (1 << 16) + 1, 1 << 16
        encode_batch = staticmethod(lambda texts: [[70_000] for _ in texts])

    stream = TokenStream.build(["x"], Wide())
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.tolist() == [70_000, 1 << 16]


def test_empty_and_damaged_streams_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no token"):
        TokenStream.build(["", ""], tokenizer)
    with pytest.raises(DataError, match="not a token stream"):
        TokenStream.load(tmp_path)
    TokenStream.build(DOCUMENTS, tokenizer, tmp_path)
    meta = json.loads((tmp_path / "stream.json").read_text())
    (tmp_path / "stream.json").write_text(json.dumps({**meta, "tokens": meta["tokens"] + 1}))
    with pytest.raises(DataError, match=r"tokens\.bin holds"):
        TokenStream.load(tmp_path)


def test_a_build_that_stops_halfway_leaves_no_stream(tokenizer, tmp_path):
    TokenStream.build(DOCUMENTS, tokenizer, tmp_path)

    def failing():
        yield DOCUMENTS[0]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        TokenStream.build(failing(), tokenizer, tmp_path)
    with pytest.raises(DataError, match="not a token stream"):
        TokenStream.load(tmp_path)


def test_split_by_document_cuts_at_the_nearest_boundary():
    train, dev = split(stream_of([50, 30, 15, 5]), 0.1)
    assert (len(train), len(dev)) == (95, 5)
    assert train.starts.tolist() == [0, 50, 80]
    assert dev.starts.tolist() == [0]


def test_split_by_position_cuts_exactly_and_may_open_inside_a_document():
    stream = stream_of([50, 50])
    train, dev = split(stream, 0.75, by="position")
    assert (len(train), len(dev)) == (25, 75)
    assert dev.starts.tolist() == [0, 25]
    assert np.concatenate([train.tokens, dev.tokens]).tolist() == stream.tokens.tolist()


@pytest.mark.parametrize(
    ("lengths", "options", "complaint"),
    [
        ([10, 10], {"validation_fraction": 1.0}, "validation_fraction"),
        ([10, 10], {"validation_fraction": float("nan")}, "validation_fraction"),
        ([20], {}, 'by: "document" needs two documents'),
        ([20], {"by": "chapter"}, "by: got 'chapter'"),
        ([3], {"by": "position"}, "too few"),
    ],
)
def test_bad_splits_are_refused(lengths, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        split(stream_of(lengths), **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.integers(2, 17))
def test_every_token_but_the_first_is_a_target_once(length, block_size):
    data = PackedDataset(stream_of([length]), block_size, pad_id=999)
    targets = []
    for item in data:
        ids, labels = item["input_ids"], item["labels"]
        assert ids.shape == labels.shape == (block_size,)
        counted = labels != IGNORE_INDEX
        assert not counted[0]
        assert torch.equal(ids[counted], labels[counted])
        targets += labels[counted].tolist()
    assert targets == list(range(1, length))
    assert data.num_targets() == length - 1


def test_iteration_ends_and_negative_indices_work():
    data = PackedDataset(stream_of([21]), 6)
    assert len(list(data)) == len(data) == 4
    assert torch.equal(data[-1]["input_ids"], data[3]["input_ids"])
    with pytest.raises(IndexError, match="got 4"):
        data[4]


def test_last_block_is_padded_or_dropped():
    last = PackedDataset(stream_of([8]), 5, pad_id=77)[1]
    assert last["input_ids"].tolist() == [4, 5, 6, 7, 77]
    assert last["labels"].tolist() == [IGNORE_INDEX, 5, 6, 7, IGNORE_INDEX]
    assert len(PackedDataset(stream_of([8]), 5, drop_last=True)) == 1


def test_segments_keep_documents_apart():
    data = PackedDataset(stream_of([3, 4, 4]), 8, segments=True)
    first, last = data[0], data[1]
    assert first["segment_ids"].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert first["labels"].tolist() == [IGNORE_INDEX, 1, 2, IGNORE_INDEX, 4, 5, 6, IGNORE_INDEX]
    assert last["segment_ids"].tolist() == [0] * 4 + [PADDING_SEGMENT] * 4
    assert last["labels"].tolist() == [IGNORE_INDEX, 8, 9, 10] + [IGNORE_INDEX] * 4
    assert data.num_targets() == sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 12))
def test_segments_follow_the_documents(lengths, block_size):
    stream = stream_of(lengths)
    if len(stream) < 2:
        return
    owner = np.repeat(np.arange(len(lengths)), lengths)
    data = PackedDataset(stream, block_size, segments=True)
    for item in data:
        real = item["segment_ids"] >= 0
        owners = owner[item["input_ids"][real].numpy()]
        assert (item["segment_ids"][real].numpy() == owners - owners[0]).all()
    assert data.num_targets() == sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in data)


def test_blocks_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="block_size: got 1"):
        PackedDataset(stream_of([9]), 1)
    with pytest.raises(ValueError, match="needs more for a block of 10"):
        PackedDataset(stream_of([9]), 10, drop_last=True)


def test_sampler_visits_everything_once_per_epoch_in_changing_order():
    sampler = IndexSampler(10, seed=3)
    first, second = ([i for _ in range(5) for i in sampler.next_batch(2)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert sampler.epochs == 2.0
    assert IndexSampler(10, seed=4).next_batch(10) != first


def test_batches_run_across_epochs():
    sampler = IndexSampler(5, seed=1)
    drawn = [i for _ in range(5) for i in sampler.next_batch(3)]
    assert [sorted(drawn[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3


def test_sampler_goes_on_from_a_saved_position():
    sampler = IndexSampler(7, seed=5)
    for _ in range(4):
        sampler.next_batch(3)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = [sampler.next_batch(3) for _ in range(6)]
    resumed = IndexSampler(7, seed=5)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(3) for _ in range(6)] == expected
    with pytest.raises(ValueError, match="saved with length 7, this run has 8"):
        IndexSampler(8, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 5"):
        IndexSampler(7, seed=6).load_state_dict(state)


def test_ranks_share_one_order():
    alone = IndexSampler(11, seed=2)
    ranks = [IndexSampler(11, seed=2, rank=r, world_size=3) for r in range(3)]
    for _ in range(8):
        together = [i for rank in ranks for i in rank.next_batch(2)]
        assert together == alone.next_batch(6)


def test_bad_samplers_are_refused():
    with pytest.raises(ValueError, match="length"):
        IndexSampler(0)
    with pytest.raises(ValueError, match="rank: got 2 of 2"):
        IndexSampler(4, rank=2, world_size=2)
