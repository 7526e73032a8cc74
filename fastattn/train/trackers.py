"""Sends the records of a run to experiment trackers: TensorBoard, trackio, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastattn.train.log import Record

Tracker = Literal["tensorboard", "trackio", "wandb"]
MODULES = {
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}  # tracker -> the module that it imports
PROJECT = "fastattn"
BOARD = "tensorboard"  # the folder of TensorBoard's files in a run's


def missing(names: Sequence[Tracker]) -> str | None:
    """The first of these trackers that is not installed."""
    return next((name for name in names if find_spec(MODULES[name]) is None), None)


class Trackers:
    """Sends the numbers of each record to the trackers, under "event/name" at the record's step.

    Args:
        names: the trackers; all must be installed.
        folder: the run's directory, whose name is the run's; TensorBoard's files go to its "tensorboard".
        options: the run's configuration, for the trackers that show it.
    """

    def __init__(self, names: Sequence[Tracker], folder: Path, options: dict[str, Any]) -> None:
        self._send: list[Callable[[dict[str, float], int], object]] = []
        self._close: list[Callable[[], object]] = []
        for name in names:
            if name == "tensorboard":
                writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / BOARD))

                def send(figures: dict[str, float], step: int, writer: Any = writer) -> None:
                    for key, value in figures.items():
                        writer.add_scalar(key, value, step)

                self._send.append(send)
                self._close.append(writer.close)
            else:
                module = import_module(MODULES[name])
                module.init(project=PROJECT, name=folder.resolve().name, config=options)
                self._send.append(_logging(module))
                self._close.append(module.finish)

    def add(self, record: Record) -> None:
        """Send one record's numbers, if it has any."""
        figures = {
            f"{record['event']}/{key}": float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if figures:
            for send in self._send:
                send(figures, record["step"])

    def close(self) -> None:
        """End the run at every tracker."""
        for close in self._close:
            close()


def _logging(module: Any) -> Callable[[dict[str, float], int], object]:
    return lambda figures, step: module.log(figures, step=step)
