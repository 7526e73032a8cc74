"""The state of a run, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn.train.log import Record
from fastattn.train.metrics import Evaluation


@dataclass
class TrainState:
    """The part of a checkpoint besides weights, optimiser, sampler and generators."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: Evaluation | None = None
    best: Evaluation | None = None
    last: Evaluation | None = None
    evaluated_step: int = -1
    evaluations_without_gain: int = 0
    nonfinite_in_a_row: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last "train" record

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that `dataclasses.asdict` wrote."""
        evaluations = {
            name: values[name] and Evaluation(**values[name]) for name in ("first", "best", "last")
        }
        return cls(**{**values, **evaluations})


@dataclass(frozen=True)
class FitResult:
    """The result of `Trainer.fit`.

    Attributes:
        stopped: the reason for its end.
        interrupted: whether that was a signal.
        steps: optimiser steps, those of earlier parts of a resumed run included.
        epochs: passes over the training data, a fraction included.
        tokens: tokens of all steps and processes that the model read, padding left out where there is a mask.
        seconds: wall time of the whole run, evaluations and earlier parts of a resumed run included.
        flops: floating-point operations of its training steps, counted on one batch and scaled by tokens; None where a
            signal ended the run before that.
        peak_memory: bytes, of the CUDA device or of this process.
        first: the evaluation before training; None without dev_data.
        best: the one with the best metric, by default the lowest loss; None without dev_data.
        last: the one at the end; None without dev_data.
        log: the records of log.jsonl; empty on ranks other than 0.
        checkpoint: the folder of the last checkpoint, a value for `resume`.
    """

    stopped: str
    interrupted: bool
    steps: int
    epochs: float
    tokens: int
    seconds: float
    flops: float | None
    peak_memory: int
    first: Evaluation | None
    best: Evaluation | None
    last: Evaluation | None
    log: list[Record]
    checkpoint: Path
