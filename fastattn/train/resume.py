"""The contents of a checkpoint that a run resumes from, read and checked before any of it is used."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastattn.train.config import TrainConfig
from fastattn.train.metrics import Evaluation
from fastattn.train.optim import Stepper
from fastattn.train.sections import ConfigError
from fastattn.train.state import TrainState

WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
GENERATORS = "generators.pt"
AVERAGE = "average.pt"  # the averaged weights, of a run with ema_decay
SHARDS = "shards"  # of a sharded run: torch.distributed.checkpoint's folder, in place of weights, optimiser and average
FILES = (STATE, GENERATORS)
WHOLE_FILES = (OPTIMIZER, WEIGHTS)
# The keys of TrainState.window, where it is not empty.
WINDOW = {"steps", "loss", "tokens", "seconds", "lr", "grad_norm"}
ROWS = ("batch_size", "accumulate")  # options that decide the rows of a process's step
# Options that change neither the weights of a run nor which of them it keeps as the best; of ROWS, `check_options` sees
# to it that the rows of a step stay the same.
WITHOUT_EFFECT = {*ROWS, "output_dir", "resume", "overwrite", "device", "loader_workers", "log_every"}
WITHOUT_EFFECT |= {"save_every", "save_seconds", "keep_checkpoints", "trackers", "peak_tflops"}
WITHOUT_EFFECT |= {"activation_checkpointing", "update_in_backward"}
INPUTS = "inputs"  # the entry of STATE with what the run was made from
SUMS = "files"  # the entry of STATE with the sums of the other files
READERS = 4  # files whose sums are computed at once


class DamagedCheckpoint(ConfigError):
    """A checkpoint cannot be used; the message names the file and the fault."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's contents besides the weights, checked."""

    state: TrainState
    sampler: dict[str, int]
    scaler: dict[str, Any]
    options: dict[str, Any]  # the TrainConfig of its run
    world_size: int
    generators: list[dict[str, Any]]  # of each process
    optimizer: dict[str, Any]  # empty where SHARDS has it
    average: list[torch.Tensor]  # averaged weights; empty without ema_decay, or where SHARDS has them

    @property
    def sharded(self) -> bool:
        return self.options.get("sharding") == "fsdp"


def read_checkpoint(folder: Path) -> Saved:
    """Everything of a checkpoint except its weights.

    Raises:
        DamagedCheckpoint: a file is missing, truncated, incomplete or of another format.
    """
    _need_files(folder, FILES)
    saved = _read_json(folder / STATE)
    path = folder / STATE
    state = _train_state(_part(saved, "state", dict, path), path)
    sampler = _part(saved, "sampler", dict, path)
    options = _part(saved, "config", dict, path)
    world_size = _part(saved, "world_size", int, path)
    for name in ("consumed", "length", "seed"):
        _part(sampler, name, int, path, "sampler.")
    for name in ("seed", *ROWS):
        _part(options, name, int, path, "config.")
    scaler = _part(saved, "scaler", dict, path)
    generators = _read_pickled(folder / GENERATORS)
    needed = {"torch", "cuda", "python", "numpy"}
    if (
        not isinstance(generators, list)
        or len(generators) != world_size
        or not all(isinstance(each, dict) and needed <= each.keys() for each in generators)
    ):
        raise DamagedCheckpoint(
            f"{folder / GENERATORS}: needs the states of torch's, Python's and NumPy's generators "
            f"for {world_size} process(es)"
        )
    if options.get("sharding") == "fsdp":
        _need_files(folder, (f"{SHARDS}/.metadata",))
        return Saved(state, sampler, scaler, options, world_size, generators, {}, [])
    _need_files(folder, WHOLE_FILES)
    optimizer = _read_pickled(folder / OPTIMIZER)
    if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
        raise DamagedCheckpoint(f"{folder / OPTIMIZER}: holds no optimiser's state and param_groups")
    average = _read_pickled(folder / AVERAGE) if options.get("ema_decay") is not None else []
    if not isinstance(average, list) or not all(isinstance(value, torch.Tensor) for value in average):
        raise DamagedCheckpoint(f"{folder / AVERAGE}: holds no list of tensors")
    return Saved(state, sampler, scaler, options, world_size, generators, optimizer, average)


def inputs_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of the inputs of its run, empty where it says nothing.

    Raises:
        DamagedCheckpoint: it is no object, or its options are none by section.
    """
    path = folder / STATE
    entries = _read_json(path)
    found: dict[str, Any] = _part(entries, INPUTS, dict, path) if entries.get(INPUTS) is not None else {}
    if "options" in found:
        options = _part(found, "options", dict, path, f"{INPUTS}.")
        for section in options:
            _part(options, section, dict, path, f"{INPUTS}.options.")
    return found


def _need_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder} is not a checkpoint (it holds no {name})")


def check(folder: Path, model: nn.Module | None) -> None:
    """Raise DamagedCheckpoint unless a checkpoint is complete, with every byte that was written.

    Args:
        folder: the checkpoint.
        model: what will be resumed, for a format of weights of its own.
    """
    saved = read_checkpoint(folder)
    if not saved.sharded:
        check_weights(folder, model)
    check_sums(folder, _read_json(folder / STATE).get(SUMS, {}))


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Bytes and CRC-32 of files in a folder, by name."""
    return {name: [(folder / name).stat().st_size, _crc(folder / name)] for name in names}


def check_sums(folder: Path, sums: Any) -> None:
    """Raise DamagedCheckpoint for the first file that is not as `sums_of` found it."""
    good = isinstance(sums, dict) and all(isinstance(v, list) and len(v) == 2 for v in sums.values())
    if not good:
        raise DamagedCheckpoint(f"{folder / STATE}: {SUMS} is {sums!r}, needs bytes and CRC-32 by file")
    for name, (size, _) in sums.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path}: is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{path}: has {path.stat().st_size} bytes, was written with {size}")
    with ThreadPoolExecutor(READERS) as pool:  # zlib computes without the interpreter's lock
        found = pool.map(lambda name: _crc(folder / name), sums)
        for (name, (_, crc)), now in zip(sums.items(), found):
            if now != crc:
                raise DamagedCheckpoint(f"{folder / name}: has other bytes than were written (CRC-32)")


def _crc(path: Path) -> int:
    value = 0
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                value = zlib.crc32(part, value)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({_reason(error)})") from None
    return value


def check_options(saved: Saved, config: TrainConfig, world_size: int, folder: Path) -> None:
    """Refuse a run whose options would change the order of examples, or that cannot use the checkpoint's state.

    Raises:
        ConfigError: an option that decides the order or the state, or the number of processes, differs; the message
            names it.
    """
    here = {**asdict(config), "world_size": world_size}
    before = {**asdict(replace(config, optimizer="adamw", ema_decay=None, sharding="ddp")), **saved.options}
    before["world_size"] = saved.world_size
    if (before["ema_decay"] is None) != (here["ema_decay"] is None):
        raise ConfigError(
            f"ema_decay: {folder} was trained with {before['ema_decay']}, this run has {here['ema_decay']}"
        )
    same = world_size == saved.world_size
    for name in ("seed", *(ROWS if same else ()), "optimizer", "sharding"):
        if before[name] != here[name]:
            raise ConfigError(f"{name}: {folder} was trained with {before[name]}, this run has {here[name]}")
    workers = (before.get("loader_workers", 0), here["loader_workers"])
    if bool(workers[0]) != bool(workers[1]):
        raise ConfigError(
            f"loader_workers: {folder} was trained with {workers[0]}, this run has {workers[1]}; batches with and "
            "without workers draw from other generators"
        )
    rows = [
        each["batch_size"] * each["accumulate"] * each["world_size"] for each in (before, here)
    ]  # of a step
    if rows[0] != rows[1]:
        raise ConfigError(
            f"batch_size: {folder} was trained with {rows[0]} rows in a step (batch_size * accumulate * "
            f"{saved.world_size} processes), this run has {rows[1]} (with {world_size} processes)"
        )


def changed_options(saved: Saved, config: TrainConfig, folder: Path) -> list[str]:
    """A line for each option that changes the run and differs from the checkpoint's, of those that it has."""
    here, before = asdict(config), saved.options
    return [
        f"{name}: {folder} was trained with {before[name]}, this run has {value}"
        for name, value in here.items()
        if name not in WITHOUT_EFFECT and name in before and before[name] != value
    ]


def check_weights(folder: Path, model: nn.Module | None) -> None:
    """Raise DamagedCheckpoint unless the file of weights is complete; models with their own format check it."""
    path = folder / WEIGHTS
    own: Callable[[Path], object] | None = getattr(type(model), "from_pretrained", None)
    try:
        if own is not None and path.stat().st_size == 0:
            own(folder)
        else:
            with safe_open(path, framework="pt"):  # its header says how long the file is
                pass
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: {_reason(error)}") from None


def check_optimizer(saved: dict[str, Any], optimizer: Stepper, path: Path) -> None:
    """Raise DamagedCheckpoint unless the saved state has the groups and shapes of this optimiser's parameters."""
    groups, here = saved["param_groups"], optimizer.param_groups
    try:
        sizes: list[int] = [len(group["params"]) for group in groups]
        needed: list[int] = [len(group["params"]) for group in here]
        states, numbers = saved["state"], [number for group in groups for number in group["params"]]
        if sizes != needed:
            raise DamagedCheckpoint(f"{path}: holds groups of {sizes} parameters, this model needs {needed}")
        for number, parameter in zip(numbers, (p for group in here for p in group["params"])):
            for name, value in states.get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    raise DamagedCheckpoint(
                        f"{path}: {name} of parameter {number} has shape {tuple(value.shape)}, "
                        f"this model's has {tuple(parameter.shape)}"
                    )
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: is not the state of an optimiser ({_reason(error)})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: is not JSON ({_reason(error)})") from None
    if not isinstance(entries, dict):
        raise DamagedCheckpoint(f"{path}: holds a {type(entries).__name__}, needs a JSON object")
    return entries


def _read_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises the exceptions of its parsers
        raise DamagedCheckpoint(f"{path}: cannot be read ({_reason(error)})") from None


def _part(entries: dict[str, Any], name: str, kind: Any, path: Path, where: str = "") -> Any:
    if name not in entries:
        raise DamagedCheckpoint(f"{path}: {where}{name} is missing")
    value: Any = entries[name]
    good = isinstance(value, kind) and not (kind is int and (isinstance(value, bool) or value < 0))
    if not good:
        need = {dict: "an object", int: "an integer of at least 0"}[kind]
        raise DamagedCheckpoint(f"{path}: {where}{name} is {value!r}, needs {need}")
    return value


def _train_state(values: dict[str, Any], path: Path) -> TrainState:
    """The state of a run; every field must be there and of its type."""
    known = {field.name: field for field in fields(TrainState)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise DamagedCheckpoint(f"{path}: state.{unknown[0]} is unknown")
    for name in known:
        if name not in values:
            raise DamagedCheckpoint(f"{path}: state.{name} is missing")
        need = _need_of(name, values[name])
        if need is not None:
            raise DamagedCheckpoint(f"{path}: state.{name} is {values[name]!r}, needs {need}")
    return TrainState.from_dict(values)


def _need_of(name: str, value: Any) -> str | None:
    """The requirement that a field's value violates, or None."""
    if name in ("first", "best", "last"):
        names = [field.name for field in fields(Evaluation)]
        return (
            None
            if value is None or _is_evaluation(value)
            else f"null or an object of {', '.join(sorted(names))}"
        )
    if name == "window":
        good = isinstance(value, dict) and all(map(_is_number, value.values()))
        good = good and (not value or value.keys() == WINDOW)
        return None if good else f"an object, empty or of the numbers {', '.join(sorted(WINDOW))}"
    if name == "seconds":
        return None if _is_number(value) and value >= 0 else "a number of at least 0"
    least = -1 if name == "evaluated_step" else 0
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return None if good else f"an integer of at least {least}"


def _is_evaluation(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    figures = value.get("figures")
    rest = {name: number for name, number in value.items() if name != "figures"}
    good = isinstance(figures, dict) and all(map(_is_number, figures.values()))
    return good and rest.keys() == {"loss", "targets"} and all(map(_is_number, rest.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
