"""The sharded part of a checkpoint: weights, optimiser and averages, by torch.distributed.checkpoint."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastattn.train.averaging import Averaged
from fastattn.train.resume import DamagedCheckpoint


def write_shards(folder: Path, model: nn.Module, optimizer: Any, averaged: Averaged | None) -> None:
    """Each process writes its part of the weights, the optimiser's state and the averages into `folder`.

    Raises:
        OSError: a process could not write; the same on all.
    """
    try:
        with _quiet():
            save(_state(model, optimizer, averaged), storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:  # not an Exception
        raise _os_error(error, folder) from error


def read_shards(folder: Path, model: nn.Module, optimizer: Any, averaged: Averaged | None) -> None:
    """Take over what any number of processes wrote; each reads what its own parts need.

    Raises:
        DamagedCheckpoint: it is of another model, or cannot be read.
    """
    state = _state(model, optimizer, averaged)
    try:
        with _quiet():
            load(state, storage_reader=FileSystemReader(folder))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    except CheckpointException as error:
        raise DamagedCheckpoint(f"{folder}: cannot be read ({_first(error)})") from None
    if averaged is not None:
        averaged.load([state["average"][str(i)] for i in range(len(averaged.values))])


def _state(model: nn.Module, optimizer: Any, averaged: Averaged | None) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    if averaged is not None:
        state["average"] = {str(i): value for i, value in enumerate(averaged.values)}
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a process alone saves or loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _os_error(error: CheckpointException, folder: Path) -> OSError:
    number = next((e.errno for e, _ in error.failures.values() if isinstance(e, OSError) and e.errno), None)
    return OSError(number or 5, f"a process could not write its part ({_first(error)})", str(folder))


def _first(error: CheckpointException) -> str:
    """The first failure, and the process that it is of."""
    rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"process {rank}: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
