"""Training options as a dataclass, read from a YAML file and command-line overrides; keys and types are checked."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import inspect
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastattn.cache import write_atomically
from fastattn.train.optim import OptimizerName, Schedule
from fastattn.train.trackers import Tracker

Sharded = Literal["ddp", "fsdp"]


class ConfigError(ValueError):
    """An option is unknown, of the wrong type or out of range, or the output directory cannot be used."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training options that do not depend on the model.

    Args:
        output_dir: the output directory.
        max_steps, max_epochs, max_seconds: the run ends at the first of these: optimiser steps, passes over the
            training data, wall time including evaluations. With max_seconds the learning rate follows the time where
            that is ahead of the steps, so that the schedule is complete at the end; such a run is not reproducible.
        batch_size: rows in a micro-batch of one process.
        accumulate: micro-batches of each process in a step.
        sharding: of a model trained by several processes: with "ddp" each has all of it, with "fsdp" a part of each
            parameter, gradient and moment (FSDP2, fully_shard), and checkpoints are torch.distributed.checkpoint's.
        loader_workers: processes that make batches ahead of the training process; 0 makes them in it. With workers,
            collate's draws go by the seed and the batch's place in the run, whatever their number.
        optimizer: "adamw", or "muon" on the matrices of the model's blocks with AdamW on the rest.
        lr, warmup_steps, schedule, min_lr_ratio: the learning rate rises linearly to lr over warmup_steps, then
            falls to lr * min_lr_ratio at the end: along a cosine, linearly, or with "wsd" linearly over the last
            decay_ratio of the steps after the warmup; "constant" stays at lr.
        decay_ratio: share of the steps in which "wsd" decays.
        weight_decay, beta1, beta2, eps: of AdamW, without decay of vectors; Muon has the same weight_decay.
        muon_lr, muon_momentum: Muon's peak rate (None for lr, which suits both) and momentum.
        grad_clip: largest norm of the gradient, None for no limit.
        precision: dtype of autocast; "auto" is bfloat16 on CUDA devices that support it, else float32.
        device: torch's name of the device; "auto" is CUDA if available, else the CPU.
        compile: train through torch.compile.
        activation_checkpointing: keep only the inputs of the model's blocks (the members of its nn.ModuleLists) for the
            backward pass, which computes the rest again; less memory, about a third more time.
        ema_decay: evaluate and save an exponential moving average of the weights with this decay; None for the weights
            themselves.
        seed: of the data's order, dropout and all other random numbers.
        deterministic: use only deterministic algorithms of torch.
        log_every, eval_every, save_every: steps between records of the log, evaluations and checkpoints; with None,
            evaluations are only before and after training, and the only checkpoint is after it.
        eval_batches: number of batches of an evaluation, from the start of the data; None for all.
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
    warmup_steps: int = 100
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
    ema_decay: float | None = None
    seed: int = 0
    deterministic: bool = False
    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    patience: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 10
    resume: str = "never"
    overwrite: bool = False
    trackers: tuple[Tracker, ...] = ()
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        _check_types(self)
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
        ("max_epochs", "max_seconds", "lr", "muon_lr", "eps", "grad_clip", "peak_tflops"), _POSITIVE
    ),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum", "ema_decay"), _DECAY),
    **dict.fromkeys(
        ("compile", "deterministic", "overwrite", "precision", "on_nonfinite", "optimizer"), _ANY
    ),
    **dict.fromkeys(("schedule", "activation_checkpointing", "trackers", "sharding"), _ANY),
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


def _check_types(config: Any) -> None:
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        object.__setattr__(config, field.name, _convert(value, hints[field.name], field.name, text=False))


def load_config(
    sections: Mapping[str, type],
    *,
    file: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Build one dataclass per section from defaults, then a YAML file, then command-line overrides.

    The file maps each section's name to its options. An override is `--section.key=value`, or `--key=value` if only one
    section has that key.

    Args:
        sections: name of each section and its dataclass.
        file: YAML file, or None.
        overrides: command-line words.
        defaults: values to start from, per section.

    Raises:
        ConfigError: the file is missing or not a mapping of sections, a section or key is unknown (the message has the
            nearest name) or ambiguous, a required option is missing, or a value has the wrong type or range.
    """
    given = given_options(sections, file=file, overrides=overrides)
    start = {name: (defaults or {}).get(name, {}) for name in sections}
    return {name: _build(kind, name, {**start[name], **given[name]}) for name, kind in sections.items()}


def given_options(
    sections: Mapping[str, type],
    *,
    file: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """The options that a file and overrides set, by section, converted to their types; as `load_config` reads them."""
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    if file is not None:
        for name, options in _read_yaml(Path(file)).items():
            _known(name, sections, f"{file}: section")
            if not isinstance(options, dict):
                raise ConfigError(f"{file}: section {name} holds {options!r}, needs options as key: value")
            for key, value in options.items():
                hint = _hint(sections[name], key, f"{file}: {name}")
                values[name][key] = _convert(value, hint, f"{file}: {name}.{key}", text=False)
    for word in overrides:
        name, key, written = _parse_override(word, sections)
        values[name][key] = _convert(written, _hint(sections[name], key, name), f"--{name}.{key}", text=True)
    return values


def save_config(sections: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write resolved sections (dataclasses) as a YAML file that `load_config` reads back to equal ones."""
    values = {name: dataclasses.asdict(section) for name, section in sections.items()}
    for options in values.values():
        options.update({key: list(value) for key, value in options.items() if isinstance(value, tuple)})
        # subclasses of int in configs, such as derived sizes, are written as numbers
        options.update(
            {key: int(v) for key, v in options.items() if isinstance(v, int) and not isinstance(v, bool)}
        )
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML writes some line separators as they are and folds them when it reads.
    if yaml.safe_load(text) != values:
        text = yaml.safe_dump(values, sort_keys=False)
    write_atomically(Path(path), text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, or an impossible date
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, needs sections as name: options")
    return content


def _parse_override(word: str, sections: Mapping[str, type]) -> tuple[str, str, str]:
    path, equals, written = word.partition("=")
    if not path.startswith("--") or not equals:
        raise ConfigError(f"{word}: needs --section.key=value")
    path = path[2:].replace("-", "_")
    name, dot, key = path.partition(".")
    if dot:
        _known(name, sections, "--" + path + ": section")
        return name, key, written
    owners = [section for section, kind in sections.items() if path in _keys(kind)]
    if len(owners) > 1:
        choices = " or ".join(f"--{owner}.{path}" for owner in owners)
        raise ConfigError(f"--{path}: more than one section has it, write {choices}")
    if not owners:
        everywhere = {key: f"{section}.{key}" for section, kind in sections.items() for key in _keys(kind)}
        near = difflib.get_close_matches(path, everywhere, n=1)
        hint = f", did you mean --{everywhere[near[0]]}?" if near else ""
        raise ConfigError(f"--{path}: no section has this option{hint}")
    return owners[0], path, written


def _known(name: str, choices: Mapping[str, Any] | Sequence[str], what: str) -> None:
    if name not in choices:
        near = difflib.get_close_matches(str(name), list(choices), n=1)
        hint = f", did you mean {near[0]}?" if near else f", the names are {', '.join(choices)}"
        raise ConfigError(f"{what} {name!r} is unknown{hint}")


def _keys(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _hint(kind: type, key: str, where: str) -> Any:
    _known(key, _keys(kind), f"{where}: option")
    hint = get_type_hints(kind)[key]
    return hint.type if isinstance(hint, dataclasses.InitVar) else hint


def _build(kind: type, name: str, values: dict[str, Any]) -> Any:
    parameters = inspect.signature(kind).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in values]
    if missing:
        raise ConfigError(f"{name}.{missing[0]}: is not set and has no default")
    return kind(**values)


def _convert(value: Any, hint: Any, where: str, *, text: bool) -> Any:
    """`value` as the hinted type, or ConfigError. With `text`, the value is a word of the command line."""
    origin = get_origin(hint)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), where, text=text)
    if origin is Literal:
        if value not in get_args(hint):
            near = difflib.get_close_matches(str(value), [str(choice) for choice in get_args(hint)], n=1)
            hinted = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{where}: got {value!r}, needs one of {', '.join(map(repr, get_args(hint)))}{hinted}"
            )
        return value
    if origin in (tuple, list, collections.abc.Sequence):
        return _convert_sequence(value, hint, where, text=text)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4 as a string
        except (ValueError, OverflowError):
            pass
    elif text and hint in (int, bool):
        value = _parse_word(value, hint)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is not bool and isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{where}: got {value!r}, needs {_TYPE_NAMES.get(hint, hint)}")


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _parse_word(word: str, hint: type) -> Any:
    if hint is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    try:
        return int(word)
    except ValueError:
        return word


def _convert_union(value: Any, choices: tuple[Any, ...], where: str, *, text: bool) -> Any:
    if type(None) in choices and (value is None or (text and value.lower() in ("none", "null"))):
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    for choice in choices:
        try:
            return _convert(value, choice, where, text=text)
        except ConfigError as error:
            failed = error
    if len(choices) == 1:
        raise failed
    raise ConfigError(
        f"{where}: got {value!r}, needs {' or '.join(str(_TYPE_NAMES.get(c, c)) for c in choices)}"
    )


def _convert_sequence(value: Any, hint: Any, where: str, *, text: bool) -> Any:
    if text:
        value = [word.strip() for word in value.strip("[]() ").split(",") if word.strip()]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: got {value!r}, needs a list")
    arguments = get_args(hint)
    if get_origin(hint) is not tuple or arguments[1:] == (Ellipsis,):
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise ConfigError(f"{where}: got {len(value)} values, needs {len(arguments)}")
    items = [
        _convert(item, kind, f"{where}[{i}]", text=text)
        for i, (item, kind) in enumerate(zip(value, arguments, strict=True))
    ]
    return tuple(items) if get_origin(hint) is tuple else items


def step_limit(config: TrainConfig, examples: int, world_size: int) -> int | None:
    """max_steps or the steps of max_epochs, whichever is less; None where only time ends the run."""
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.max_epochs is not None:
        limits.append(
            math.ceil(config.max_epochs * examples / (config.batch_size * config.accumulate * world_size))
        )
    return min(limits, default=None)
