"""Writes everything that a run is resumed from to a checkpoint's folder, and reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.data.packing import IndexSampler
from fastattn.data.tokenization import Tokenizer
from fastattn.train.averaging import Averaged
from fastattn.train.checkpoint import read_model, write_model
from fastattn.train.config import TrainConfig
from fastattn.train.distributed import Distributed
from fastattn.train.optim import Stepper
from fastattn.train.resume import (
    AVERAGE,
    GENERATORS,
    OPTIMIZER,
    STATE,
    DamagedCheckpoint,
    check_optimizer,
    check_options,
    read_checkpoint,
)
from fastattn.train.rng import random_state, restore_random_state
from fastattn.train.state import TrainState


@dataclass(frozen=True)
class Snapshot:
    """The parts of a run that change during training, besides its TrainState."""

    config: TrainConfig
    model: nn.Module
    tokenizer: Tokenizer | None
    optimizer: Stepper
    averaged: Averaged | None
    scaler: torch.amp.GradScaler
    sampler: IndexSampler
    distributed: Distributed
    device: torch.device

    def generators(self) -> list[dict[str, Any]]:
        """The states of all processes' random generators, on the first."""
        return self.distributed.gather(random_state(self.device))

    def write(self, folder: Path, state: TrainState, generators: list[dict[str, Any]]) -> None:
        """Write all files of a checkpoint into a folder."""
        write_model(self.model, folder, self.tokenizer)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        torch.save(generators, folder / GENERATORS)
        if self.averaged is not None:
            torch.save(self.averaged.values, folder / AVERAGE)
        written = {
            "state": asdict(state),
            "sampler": self.sampler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.config),
            "world_size": self.distributed.world_size,
        }
        (folder / STATE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> TrainState:
        """Load everything that `write` wrote, after checking that the run has the same order of data.

        Raises:
            ConfigError: options that decide the order of data or the state differ.
            DamagedCheckpoint: a file cannot be used.
        """
        saved = read_checkpoint(folder)
        check_options(saved, self.config, self.distributed.world_size, folder)
        self.sampler.load_state_dict(saved.sampler)
        check_optimizer(saved.optimizer, self.optimizer, folder / OPTIMIZER)
        read_model(self.model, folder)
        try:
            self.optimizer.load_state_dict(saved.optimizer)
            self.scaler.load_state_dict(saved.scaler)
            if self.averaged is not None:
                self.averaged.load(saved.average)
            restore_random_state(saved.generators[self.distributed.rank], self.device)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{folder}: its state cannot be restored ({error})") from None
        return saved.state
