"""The options of training that do not depend on the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastattn.train.optim import OptimizerName, Schedule
from fastattn.train.sections import ConfigError, check_types
from fastattn.train.trackers import Tracker

Sharded = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training options that do not depend on the model.

    Args:
        output_dir: the output directory.
        max_steps, max_epochs, max_seconds: the run ends at the first of these: optimiser steps, passes over the
            training data, wall time including evaluations. With max_seconds the learning rate follows the time where
            that is ahead of the steps, so that the schedule is complete at the end; such a run is not reproducible.
            Where time may end the run, the warmup ends after half of it at the latest.
        batch_size: rows in a micro-batch of one process.
        accumulate: micro-batches of each process in a step.
        sharding: of a model trained by several processes: with "ddp" each has all of it, with "fsdp" a part of each
            parameter, gradient and moment (FSDP2, fully_shard), and checkpoints are torch.distributed.checkpoint's.
        loader_workers: processes that make batches ahead of the training process; 0 makes them in it. With workers,
            collate's draws go by the seed and the batch's place in the run, whatever their number.
        optimizer: "adamw", or "muon" on the matrices of the model's blocks with AdamW on the rest.
        lr, warmup_steps, schedule, min_lr_ratio: the learning rate rises linearly to lr over warmup_steps (None for a
            tenth of the run, by time where that may end it), then falls to lr * min_lr_ratio at the end: along a
            cosine, linearly, or with "wsd" linearly over the last decay_ratio of the steps after the warmup;
            "constant" stays at lr.
        decay_ratio: share of the steps in which "wsd" decays.
        weight_decay, beta1, beta2, eps: of AdamW, without decay of vectors; Muon has the same weight_decay.
        muon_lr, muon_momentum: Muon's peak rate (None for lr, which suits both) and momentum.
        grad_clip: largest norm of the gradient, None for no limit.
        precision: dtype of autocast; "auto" is bfloat16 on CUDA devices that support it, else float32.
        device: torch's name of the device; "auto" is CUDA if available, else the CPU.
        compile: train through torch.compile.
        activation_checkpointing: keep only the inputs of the model's blocks (the members of its nn.ModuleLists) for the
            backward pass, which computes the rest again; less memory, about a third more time.
        update_in_backward: update each parameter in the backward pass once its gradient is complete, which is then
            dropped: the same weights from less memory, most of the gradients'. Needs one process, accumulate=1,
            grad_clip=None, as the norm of all gradients is known only after the pass, and on_nonfinite="stop", which
            leaves the weights changed.
        ema_decay: evaluate and save an exponential moving average of the weights with this decay, or (1 + n) / (10 + n)
            after n steps where that is less; None for the weights themselves.
        seed: of the data's order, dropout and all other random numbers.
        deterministic: use only deterministic algorithms of torch.
        log_every, eval_every, save_every: steps between records of the log, evaluations and checkpoints; with None,
            evaluations are only before and after training, and checkpoints only by time and after it.
        save_seconds: a checkpoint is also written when this wall time has passed since the last one, or since the first
            step; None for no checkpoint by time. It changes no result.
        eval_batches: number of batches of which an evaluation computes the loss, of rows evenly spaced over the data;
            None for all. Other figures, which `evaluate_with` returns, are of what it reads: a task's of all its data.
        keep_checkpoints: number of the newest checkpoints that are kept.
        patience: end after this many evaluations in a row without a gain.
        on_nonfinite: at a loss or gradient that is not finite, "stop" raises TrainingDiverged, and "skip" skips the
            step, up to max_nonfinite times in a row.
        resume: "never", "auto" (from the newest complete checkpoint in output_dir, if there is one) or a
            checkpoint's path.
        overwrite: delete an earlier run in output_dir.
        trackers: experiment trackers that also get the records: "tensorboard", "trackio", "wandb"; each must be
            installed.
        peak_tflops: peak of the device, for "mfu" in the log; None looks it up by the device's name.

    Raises:
        ConfigError: an option has the wrong type or is out of range, or no limit is set.
    """

    output_dir: str
    max_steps: int | None = None
    max_epochs: float | None = None
    max_seconds: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    sharding: Sharded = "ddp"
    loader_workers: int = 0
    optimizer: OptimizerName = "adamw"
    lr: float = 3e-4
    schedule: Schedule = "cosine"
    decay_ratio: float = 0.2
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_lr: float | None = None
    muon_momentum: float = 0.95
    grad_clip: float | None = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    update_in_backward: bool = False
    ema_decay: float | None = None
    seed: int = 0
    deterministic: bool = False
    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int | None = None
    save_every: int | None = None
    save_seconds: float | None = 900.0
    keep_checkpoints: int = 2
    patience: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 10
    resume: str = "never"
    overwrite: bool = False
    trackers: tuple[Tracker, ...] = ()
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, (good, need) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not good(value):
                raise ConfigError(f"{name}: got {value!r}, needs {need}")
        if self.max_steps is None and self.max_epochs is None and self.max_seconds is None:
            raise ConfigError("max_steps, max_epochs, max_seconds: none is set, needs at least one")
        if self.patience is not None and self.eval_every is None:
            raise ConfigError("patience: needs eval_every, because it counts evaluations")
        if self.sharding == "fsdp" and self.optimizer == "muon":
            raise ConfigError(
                "optimizer: muon needs whole matrices, sharding=fsdp splits them over processes; optimizer=adamw "
                "works, and so does sharding=ddp"
            )
        if self.sharding == "fsdp" and self.compile:
            raise ConfigError("compile: is not supported with sharding=fsdp; it is with sharding=ddp")
        if self.update_in_backward:
            self._check_update_in_backward()

    def _check_update_in_backward(self) -> None:
        needed = {"grad_clip": None, "accumulate": 1, "on_nonfinite": "stop", "sharding": "ddp"}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"update_in_backward: got {name}={getattr(self, name)}, needs {name}={value}, as a parameter is "
                    "updated before the other gradients are known"
                )
        if self.precision == "float16":
            raise ConfigError(
                "update_in_backward: got precision=float16, whose gradients are scaled; bfloat16 works"
            )


MAX_COUNT = 2**63 - 1  # of steps, rows and other counts
MAX_WORKERS = 1024  # processes that load batches
MAX_SEED = 2**64 - 2**32  # a generator's seed has 64 bits; each process adds its rank

_COUNT = (lambda v: 1 <= v <= MAX_COUNT, f"an integer of at least 1, at most {MAX_COUNT}")
_POSITIVE = (lambda v: v > 0 and math.isfinite(v), "a finite number above 0")
_DECAY = (lambda v: 0 <= v < 1, "a number within [0, 1)")
_ANY = (lambda v: True, "")  # its type is the only requirement
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # every option has a requirement
    **dict.fromkeys(
        ("max_steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_batches"), _COUNT
    ),
    **dict.fromkeys(("save_every", "keep_checkpoints", "patience", "max_nonfinite"), _COUNT),
    **dict.fromkeys(
        ("max_epochs", "max_seconds", "save_seconds", "lr", "muon_lr", "eps", "grad_clip", "peak_tflops"),
        _POSITIVE,
    ),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum", "ema_decay"), _DECAY),
    **dict.fromkeys(
        ("compile", "deterministic", "overwrite", "precision", "on_nonfinite", "optimizer"), _ANY
    ),
    **dict.fromkeys(
        ("schedule", "activation_checkpointing", "trackers", "sharding", "update_in_backward"), _ANY
    ),
    "loader_workers": (lambda v: 0 <= v <= MAX_WORKERS, f"an integer of at least 0, at most {MAX_WORKERS}"),
    "decay_ratio": (lambda v: 0 < v <= 1, "a number within (0, 1]"),
    "warmup_steps": (lambda v: 0 <= v <= MAX_COUNT, "an integer of at least 0"),
    "seed": (lambda v: 0 <= v <= MAX_SEED, f"an integer of at least 0, at most {MAX_SEED}"),
    "weight_decay": (lambda v: v >= 0 and math.isfinite(v), "a finite number of at least 0"),
    "min_lr_ratio": (lambda v: 0 <= v <= 1, "a number within [0, 1]"),
    "output_dir": (bool, "a directory"),
    "resume": (bool, '"never", "auto" or a checkpoint directory'),
    "device": (bool, '"auto" or the name of a device'),
}


def step_limit(config: TrainConfig, examples: int, world_size: int) -> int | None:
    """max_steps or the steps of max_epochs, whichever is less; None where only time ends the run."""
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.max_epochs is not None:
        limits.append(
            math.ceil(config.max_epochs * examples / (config.batch_size * config.accumulate * world_size))
        )
    return min(limits, default=None)
