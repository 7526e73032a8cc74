"""Batches made ahead of the training process, by the worker processes of torch's DataLoader."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastattn import torch_compat
from fastattn.data.packing import IndexSampler
from fastattn.train.batches import Batch, Examples
from fastattn.train.rng import seed_all, seed_at

Request = tuple[int, list[int]]  # a batch's place in the run, and its items


class WorkerBatches:
    """The micro-batches of this process, in order from where a sampler is.

    Before a batch is made its worker seeds the global generators by the run's seed and the batch's place, the number of
    items that all processes read before it. So batches are the same with any number of workers, and in a run that
    goes on from a checkpoint, although workers are ahead of the training.

    Args:
        data: items by index; a process that is not forked gets it pickled.
        collate: makes a batch of a list of items, in a worker.
        sampler: this process's; it is copied, so that its own place stays that of the training.
        batch_size: items of a micro-batch.
        seed: the run's.
        workers: how many processes, at least 1.
        pin: copy batches to page-locked memory, for a CUDA device.
    """

    def __init__(
        self,
        data: Examples,
        collate: Callable[[list[Any]], Batch],
        sampler: IndexSampler,
        batch_size: int,
        seed: int,
        workers: int,
        *,
        pin: bool = False,
    ) -> None:
        loader = DataLoader(
            _Maker(data, collate, seed),
            batch_size=None,  # a request is a whole batch
            sampler=_Requests(sampler, batch_size),
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
            pin_memory=pin,
            generator=torch.Generator(),  # else it would draw from the global one, which is the model's
        )
        self._batches: Iterator[Batch] | None = iter(loader)

    def __next__(self) -> Batch:
        assert self._batches is not None
        return next(self._batches)

    def close(self) -> None:
        """End the workers.

        An error of a worker keeps the iterator in its traceback, and a process that exits waits for workers, which
        leave its signals: so they are ended here and not with the last reference.
        """
        if self._batches is not None:
            torch_compat.end_loader_workers(self._batches)
        self._batches = None


class _Requests:
    def __init__(self, sampler: IndexSampler, batch_size: int) -> None:
        self.sampler = IndexSampler(
            sampler.length, sampler.seed, rank=sampler.rank, world_size=sampler.world_size
        )
        self.sampler.load_state_dict(sampler.state_dict())
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Request]:
        while True:
            place = self.sampler.consumed + self.sampler.rank * self.batch_size
            yield place, self.sampler.next_batch(self.batch_size)


class _Maker(Dataset[Any]):
    def __init__(self, data: Examples, collate: Callable[[list[Any]], Batch], seed: int) -> None:
        self.data = data
        self.collate = collate
        self.seed = seed

    def __getitem__(self, request: Request) -> Batch:
        place, indices = request
        seed_all(seed_at(self.seed, place))
        return self.collate([self.data[index] for index in indices])


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(number: int) -> None:
    """Signals to stop are for the training process, which ends its workers; a terminal sends them to all."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
