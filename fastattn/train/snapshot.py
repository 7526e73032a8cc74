"""Writes everything that a run is resumed from to a checkpoint's folder, and reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from fastattn.train.optim import Stepper, hyperparameters, set_hyperparameters
from fastattn.train.resume import (
    AVERAGE,
    GENERATORS,
    INPUTS,
    OPTIMIZER,
    SHARDS,
    STATE,
    SUMS,
    DamagedCheckpoint,
    changed_options,
    check_optimizer,
    check_options,
    read_checkpoint,
    sums_of,
)
from fastattn.train.rng import random_state, restore_random_state, seed_all, seed_at
from fastattn.train.sections import ConfigError
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
    inputs: Mapping[str, Any] | None = None  # what the run was made from, in JSON's types

    def generators(self) -> list[dict[str, Any]]:
        """The states of all processes' random generators, on the first."""
        return self.distributed.gather(random_state(self.device))

    @property
    def in_shards(self) -> bool:
        """Whether checkpoints are torch.distributed.checkpoint's, which any number of processes reads."""
        return self.config.sharding == "fsdp"

    def write_shards(self, folder: Path) -> None:
        """Write this process's part of a checkpoint, if its format has parts; all do so before the first's `write`."""
        if self.in_shards:
            from fastattn.train import shards  # slow to import, and no other run needs it

            shards.write_shards(folder / SHARDS, self.model, self.optimizer, self.averaged)

    def write(self, folder: Path, state: TrainState, generators: list[dict[str, Any]]) -> None:
        """Write all files of a checkpoint into a folder."""
        if not self.in_shards:
            write_model(self.model, folder, self.tokenizer)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            if self.averaged is not None:
                torch.save(self.averaged.values, folder / AVERAGE)
        elif self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        torch.save(generators, folder / GENERATORS)
        names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        written = {
            "state": asdict(state),
            "sampler": self.sampler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.config),
            "world_size": self.distributed.world_size,
            INPUTS: self.inputs,
            SUMS: sums_of(folder, sorted(names)),
        }
        (folder / STATE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> tuple[TrainState, list[str]]:
        """Load everything that `write` wrote, after checking that the run has the same order of data.

        Random generators go on where they were, unless the checkpoint is of another number of processes: then each
        process gets new ones, by the seed, the step and its rank. The optimiser keeps this run's hyperparameters.
        Returns the state, and a line for each option that changes the run and for another number of processes.

        Raises:
            ConfigError: options that decide the order of data or the state differ.
            DamagedCheckpoint: a file cannot be used.
        """
        saved = read_checkpoint(folder)
        check_options(saved, self.config, self.distributed.world_size, folder)
        self.sampler.load_state_dict(saved.sampler)
        rank, world_size = self.distributed.rank, self.distributed.world_size
        own = hyperparameters(self.optimizer)
        notes = changed_options(saved, self.config, folder)
        try:
            if saved.sharded:
                from fastattn.train import shards

                shards.read_shards(folder / SHARDS, self.model, self.optimizer, self.averaged)
            else:
                check_optimizer(saved.optimizer, self.optimizer, folder / OPTIMIZER)
                read_model(self.model, folder)
                self.optimizer.load_state_dict(saved.optimizer)
                if self.averaged is not None:
                    self.averaged.load(saved.average)
            set_hyperparameters(self.optimizer, own)
            self.scaler.load_state_dict(saved.scaler)
            if saved.world_size == world_size:
                restore_random_state(saved.generators[rank], self.device)
            else:
                seed_all(seed_at(self.config.seed, saved.state.step, world_size, rank))
                notes.append(
                    f"the checkpoint is of {saved.world_size} process(es), this run has {world_size}: "
                    "dropout and other random draws go on from new generators"
                )
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{folder}: its state cannot be restored ({error})") from None
        return saved.state, notes
