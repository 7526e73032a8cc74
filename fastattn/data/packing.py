"""Token streams divided into blocks for training language models, in memory or memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastattn.cache import write_atomically
from fastattn.constants import IGNORE_INDEX, MAX_INT32
from fastattn.data.array_files import save_array
from fastattn.data.checks import check_flag, check_integer, check_text, check_texts
from fastattn.data.corpora import DataError
from fastattn.data.tokenization import Tokenizer
from fastattn.integers import cdiv

PADDING_SEGMENT = -1  # attends to nothing
ENCODE_CHARACTERS = 1 << 20  # characters that are tokenised at a time


@dataclass(frozen=True)
class TokenStream:
    """Documents as one run of token ids, each followed by the end-of-text token.

    Its length is N, and a slice of it (step 1) is the stream of that part.

    Attributes:
        tokens: (N,) uint16 or uint32, possibly memory-mapped.
        starts: (documents,) int64, increasing from 0: the first token of each document.
    """

    tokens: npt.NDArray[np.unsignedinteger]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls, documents: Iterable[str], tokenizer: Tokenizer, directory: str | os.PathLike[str] | None = None
    ) -> TokenStream:
        """Tokenise documents, into memory or, given a directory, into files there that are then memory-mapped.

        Args:
            documents: texts, read once; those without a token are left out.
            tokenizer: its ids are kept as uint16 where the vocabulary fits, else as uint32.
            directory: created if it does not exist; an earlier stream there is replaced.

        Raises:
            DataError: the documents hold no token.
            TypeError: documents is one text or holds something else than texts, or tokenizer is not a tokenizer.
            OSError: a file cannot be written.
        """
        check_texts("documents", documents)
        if not all(hasattr(tokenizer, name) for name in ("encode_batch", "eos_id", "vocab_size")):
            raise TypeError(f"tokenizer: got a {type(tokenizer).__name__}, needs a Tokenizer")
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        pieces = _encoded(documents, tokenizer, dtype)
        if directory is not None:
            _write(Path(directory), pieces, np.dtype(dtype))
            return cls.load(directory)
        kept, lengths = [], []
        for piece, sizes in pieces:
            kept.append(piece)
            lengths.extend(sizes)
        return cls(np.concatenate(kept or [np.empty(0, dtype)]), _starts(lengths))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> TokenStream:
        """Memory-map a stream that `build` wrote.

        Raises:
            DataError: the directory holds no such stream, or a damaged one.
        """
        folder = Path(directory)
        try:
            meta = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or meta.get("dtype") not in ("uint16", "uint32"):
                raise ValueError("stream.json names no dtype, needs uint16 or uint32")
            starts = np.load(folder / "starts.npy", allow_pickle=False)
            tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        except (OSError, EOFError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{folder}: is not a token stream ({error})") from None
        if len(tokens) != meta.get("tokens"):
            raise DataError(f"{folder}: tokens.bin holds {len(tokens)} tokens, needs {meta.get('tokens')}")
        good = (
            isinstance(starts, np.ndarray)
            and starts.dtype == np.int64
            and starts.ndim == 1
            and len(starts) > 0
        )
        if not good or starts[0] != 0 or starts[-1] >= len(tokens) or bool((np.diff(starts) <= 0).any()):
            raise DataError(
                f"{folder}: starts.npy holds no rising starts of documents within {len(tokens)} tokens"
            )
        return cls(tokens, starts)

    def __getitem__(self, part: slice) -> TokenStream:
        """The stream of a contiguous part, sharing its memory; a part may begin inside a document."""
        first, last, step = part.indices(len(self.tokens))
        if step != 1:
            raise ValueError(f"part: got step {step}, needs 1")
        last = max(first, last)
        inside = self.starts[(self.starts > first) & (self.starts < last)] - first
        return TokenStream(self.tokens[first:last], np.concatenate([np.zeros(1, np.int64), inside]))


def _encoded(
    documents: Iterable[str], tokenizer: Tokenizer, dtype: type[np.unsignedinteger]
) -> Iterator[tuple[npt.NDArray[np.unsignedinteger], list[int]]]:
    """Batches of encoded documents: their tokens as one array, and the length of each."""
    empty = True
    for texts in batched_texts(documents):
        rows = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts) if ids]
        if rows:
            empty = False
            yield np.concatenate([np.asarray(row, dtype) for row in rows]), [len(row) for row in rows]
    if empty:
        raise DataError("documents: got no token, needs some text")


def batched_texts(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about `ENCODE_CHARACTERS` characters, or of one that is longer."""
    held: list[str] = []
    size = 0
    for document in documents:
        check_text("documents", document)
        held.append(document)
        size += len(document)
        if size >= ENCODE_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _starts(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)[:-1]])


def _write(
    folder: Path, pieces: Iterable[tuple[npt.NDArray[np.unsignedinteger], list[int]]], dtype: np.dtype
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stream.json").unlink(missing_ok=True)  # written last: a folder without it is incomplete
    lengths: list[int] = []
    with (folder / "tokens.bin").open("wb") as file:
        for piece, sizes in pieces:
            file.write(piece.data)
            lengths.extend(sizes)
    save_array(folder / "starts.npy", _starts(lengths))
    meta = {"dtype": dtype.name, "tokens": sum(lengths), "documents": len(lengths)}
    write_atomically(folder / "stream.json", json.dumps(meta) + "\n")


def split(
    stream: TokenStream, validation_fraction: float = 0.1, *, by: Literal["document", "position"] = "document"
) -> tuple[TokenStream, TokenStream]:
    """The stream's beginning for training and its end for validation; both share the stream's memory.

    Args:
        stream: what to split.
        validation_fraction: share of tokens held out, within (0, 1).
        by: "document" splits at the document boundary nearest to that share; "position" at exactly that token.

    Returns:
        (training, validation).

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: the fraction is out of range, a part would have fewer than 2 tokens, or there is no boundary.
    """
    if not isinstance(stream, TokenStream):
        raise TypeError(f"stream: got a {type(stream).__name__}, needs a TokenStream")
    if not isinstance(validation_fraction, (int, float)) or isinstance(validation_fraction, bool):
        raise TypeError(f"validation_fraction: got {validation_fraction!r}, needs a number between 0 and 1")
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction: got {validation_fraction}, needs a number between 0 and 1")
    cut = round(len(stream) * (1.0 - validation_fraction))
    if by == "document":
        if len(stream.starts) < 2:
            raise ValueError('by: "document" needs two documents or more, the stream has one; use "position"')
        boundaries = stream.starts[1:]
        cut = int(boundaries[np.argmin(np.abs(boundaries - cut))])
    elif by != "position":
        raise ValueError(f'by: got {by!r}, needs "document" or "position"')
    if min(cut, len(stream) - cut) < 2:
        raise ValueError(
            f"stream: {len(stream)} tokens are too few to hold out a part of {validation_fraction:.0%}"
        )
    return stream[:cut], stream[cut:]


class PackedDataset:
    """Blocks of a token stream as rows for a causal language model that shifts the labels.

    Block i holds tokens `i*(T-1)` to `i*(T-1)+T-1`: neighbours share one token, so that every token but the stream's
    first is a target exactly once. The last block is padded. Each item is a dict of (T,) int64 tensors:
    `input_ids`; `labels`, equal to input_ids with IGNORE_INDEX at the first token and at padding; and, with `segments`,
    `segment_ids`: 0, 1, ... per document in the block and PADDING_SEGMENT at padding. Each document's first label is
    then IGNORE_INDEX, because no token of its segment predicts it.

    Args:
        stream: the tokens.
        block_size: T, at least 2.
        pad_id: the token that fills the last block.
        segments: add segment ids, so that documents in a block do not attend to each other.
        drop_last: drop the last block when it is not full.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: block_size is below 2, pad_id below 0, or the stream is too short for a block.
    """

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        *,
        pad_id: int = 0,
        segments: bool = False,
        drop_last: bool = False,
    ) -> None:
        if not isinstance(stream, TokenStream):
            raise TypeError(f"stream: got a {type(stream).__name__}, needs a TokenStream")
        block_size = check_integer("block_size", block_size, 2, MAX_INT32)
        pad_id = check_integer("pad_id", pad_id, 0)
        check_flag("segments", segments)
        check_flag("drop_last", drop_last)
        targets, stride = len(stream) - 1, block_size - 1
        self.num_blocks = targets // stride if drop_last else cdiv(targets, stride)
        if self.num_blocks < 1:
            raise ValueError(f"stream: got {len(stream)} tokens, needs more for a block of {block_size}")
        self.stream = stream
        self.block_size = block_size
        self.pad_id = pad_id
        self.segments = segments

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self.num_blocks <= index < self.num_blocks:
            raise IndexError(f"index: got {index}, the dataset has {self.num_blocks} blocks")
        first = (index % self.num_blocks) * (self.block_size - 1)
        tokens = self.stream.tokens[first : first + self.block_size]
        length = len(tokens)
        input_ids = np.full(self.block_size, self.pad_id, np.int64)
        input_ids[:length] = tokens
        labels = np.full(self.block_size, IGNORE_INDEX, np.int64)
        labels[1:length] = tokens[1:]
        item = {"input_ids": input_ids, "labels": labels}
        if self.segments:
            begins = self._document_starts(first, length)
            labels[begins] = IGNORE_INDEX
            item["segment_ids"] = _segments(begins, length, self.block_size)
        return {name: torch.from_numpy(values) for name, values in item.items()}

    def _document_starts(self, first: int, length: int) -> npt.NDArray[np.int64]:
        """Offsets at which documents begin in the block; its first token always begins one."""
        low, high = np.searchsorted(self.stream.starts, [first + 1, first + length])
        return np.concatenate([np.zeros(1, np.int64), self.stream.starts[low:high] - first])

    def num_targets(self) -> int:
        """Tokens that count in the loss over one pass."""
        last = min(len(self.stream), self.num_blocks * (self.block_size - 1) + 1)
        if not self.segments:
            return last - 1
        positions = self.stream.starts[(self.stream.starts > 0) & (self.stream.starts < last)]
        return last - 1 - len(positions)


def _segments(begins: npt.NDArray[np.int64], length: int, block_size: int) -> npt.NDArray[np.int64]:
    marks = np.zeros(length, np.int64)
    marks[begins[1:]] = 1
    segment_ids = np.full(block_size, PADDING_SEGMENT, np.int64)
    segment_ids[:length] = np.cumsum(marks)
    return segment_ids


class IndexSampler:
    """An endless, reproducible order over a dataset: one permutation after another, cut into equal batches.

    Batches continue across the end of an epoch, so that none is short and no index is left out. The position is one
    integer. The order depends only on (length, seed): two ranks with batch size n draw together what one process draws
    with 2n.

    Args:
        length: size of the dataset.
        seed: determines each permutation, together with the number of the epoch.
        rank, world_size: this process takes every world_size-th batch.
    """

    def __init__(self, length: int, seed: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        length, seed = check_integer("length", length, 1), check_integer("seed", seed, 0, 2**64 - 1)
        check_integer("rank", rank, -(2**63))
        check_integer("world_size", world_size, 1)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} of {world_size}, needs a rank within [0, world_size)")
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.consumed = 0  # indices drawn by all ranks together
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def epochs(self) -> float:
        """Passes over the dataset so far."""
        return self.consumed / self.length

    def next_batch(self, batch_size: int) -> list[int]:
        """This rank's next indices; the position of all ranks advances by batch_size * world_size."""
        first = self.consumed + self.rank * batch_size
        self.consumed += batch_size * self.world_size
        return [self._index(position) for position in range(first, first + batch_size)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length))
        return int(self._order[1][offset])

    def state_dict(self) -> dict[str, int]:
        """The position, to be saved."""
        return {"consumed": self.consumed, "length": self.length, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Move to a saved position; ValueError for one of another dataset length or seed."""
        for name in ("length", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"state: saved with {name} {state[name]}, this run has {getattr(self, name)}"
                )
        self.consumed = state["consumed"]
