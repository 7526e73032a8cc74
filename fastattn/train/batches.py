"""Examples by index, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Examples(Protocol):
    """Training or validation data: items by index, which `collate` combines into a batch with "labels"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Batches:
    """Makes batches on a device.

    Args:
        collate: makes a dict of tensors from a list of items.
        device: the device of the batches.
    """

    def __init__(self, collate: Callable[[list[Any]], Batch], device: torch.device) -> None:
        self.collate = collate
        self.device = device

    def of(self, data: Examples, indices: Sequence[int]) -> Batch:
        """The batch of these items.

        Raises:
            TypeError: the collated batch is not a dict with "labels".
        """
        return self.moved(self.collate([data[index] for index in indices]))

    def moved(self, batch: Batch) -> Batch:
        """A collated batch on the device.

        Raises:
            TypeError: it is no dict with "labels".
        """
        if not isinstance(batch, dict) or "labels" not in batch:
            raise TypeError('train_data, dev_data: a collated batch must be a dict of tensors with "labels"')
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def in_order(
        self, data: Examples, size: int, limit: int | None, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """This process's share of the data in batches of `size`, or of `limit` batches of evenly spaced items of it.

        The first items would be no sample of the data: packed rows begin with the longest documents.
        """
        count = len(data) if limit is None else min(limit * size, len(data))
        items = (
            [number * len(data) // count for number in range(count)] if count < len(data) else range(count)
        )
        for start in range(0, count, size)[rank::world_size]:
            yield self.of(data, items[start : start + size])
