"""Sends the records of a run to experiment trackers: TensorBoard, trackio, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastattn.cache import write_atomically
from fastattn.train.log import Record

Tracker = Literal["tensorboard", "trackio", "wandb"]
MODULES = {
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}  # tracker -> the module that it imports
PROJECT = "fastattn"
BOARD = "tensorboard"  # the folder of TensorBoard's files in a run's
RUNS = "trackers.json"  # by tracker, what it knows the run by
KNOWN_BY = {"wandb": "id", "trackio": "name"}  # the argument and attribute that a resumed run is named by


def missing(names: Sequence[Tracker]) -> str | None:
    """The first of these trackers that is not installed."""
    return next((name for name in names if find_spec(MODULES[name]) is None), None)


class Trackers:
    """Sends the numbers of each record to the trackers, under "event/name" at the record's step.

    A resumed run goes on as the same run of each tracker: TensorBoard drops what came after the checkpoint, and trackio
    and Weights & Biases get what RUNS in the folder says that they know the run by.

    Args:
        names: the trackers; all must be installed.
        folder: the run's directory, whose name is the run's; TensorBoard's files go to its "tensorboard".
        options: the run's configuration, for the trackers that show it.
        resume_step: the step of the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(
        self,
        names: Sequence[Tracker],
        folder: Path,
        options: dict[str, Any],
        *,
        resume_step: int | None = None,
    ) -> None:
        self._send: list[Callable[[dict[str, float], int], object]] = []
        self._close: list[Callable[[], object]] = []
        runs = {} if resume_step is None else _runs_of(folder / RUNS)
        for name in names:
            if name == "tensorboard":
                first = 0 if resume_step is None else resume_step + 1
                board = import_module("torch.utils.tensorboard")
                writer = board.SummaryWriter(str(folder / BOARD), purge_step=first)

                def send(figures: dict[str, float], step: int, writer: Any = writer) -> None:
                    for key, value in figures.items():
                        writer.add_scalar(key, value, step)

                self._send.append(send)
                self._close.append(writer.close)
            else:
                module = import_module(MODULES[name])
                given = {"name": folder.resolve().name}
                if name in runs:
                    given |= {KNOWN_BY[name]: runs[name], "resume": "allow"}
                run = module.init(project=PROJECT, config=options, **given)
                runs[name] = str(getattr(run, KNOWN_BY[name]))
                self._send.append(_logging(module))
                self._close.append(module.finish)
        if runs:
            write_atomically(folder / RUNS, json.dumps(runs) + "\n")

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


def _runs_of(path: Path) -> dict[str, str]:
    """The contents of RUNS; nothing where there is none that can be read, so that new runs begin."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {name: run for name, run in known if name in KNOWN_BY and isinstance(run, str)}


def _logging(module: Any) -> Callable[[dict[str, float], int], object]:
    return lambda figures, step: module.log(figures, step=step)
