"""The sections of a task's run besides `TrainConfig`: its data and its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import yaml

from fastattn.data.checks import check_flag, check_integer
from fastattn.data.cleaning import CleaningConfig
from fastattn.data.input_tokenizers import KINDS
from fastattn.data.records import FORMATS
from fastattn.models import GPT, BertConfig, GPTConfig
from fastattn.models.bert_config import PRESETS as ENCODERS
from fastattn.models.config import PRESETS as DECODERS
from fastattn.models.lora import ALL_LINEAR
from fastattn.train.config import TrainConfig
from fastattn.train.sections import ConfigError, given_options, load_config


@dataclass(frozen=True)
class DataConfig:
    """Options of the data and the tokenizer.

    Args:
        columns: the columns of the task's fields, as "label=topic"; by default the columns of the same names.
        format: the format of every file, regardless of its suffix: jsonl, json, csv, tsv, conll or text.
        dev_fraction: share of the training data that is held out where no --dev is given: of the examples, or for
            causal-lm and masked-lm of the text, where it may be the end of a document.
        tokenizer: a folder with the tokenizer, instead of the model's; or for a preset "wordpiece", "bpe" or
            "characters", trained on the training data.
        vocab_size: of a tokenizer that is trained.
        lowercase: whether a trained tokenizer drops case and accents; None for yes, except in tasks that write text.
            "bpe" and decoders keep both.
        cache: folder for the files of causal-lm and masked-lm, of which a later run with the same data and tokenizer
            makes use; by default data of 64 MB and more has files in the user's cache.
    """

    columns: tuple[str, ...] = ()
    format: str | None = None
    dev_fraction: float = 0.1
    tokenizer: str | None = None
    vocab_size: int = 8192
    lowercase: bool | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        for each in self.columns:
            name, equals, column = each.partition("=")
            if not (name and equals and column):
                raise ConfigError(f"data.columns: got {each!r}, needs FIELD=COLUMN")
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"data.format: got {self.format!r}, needs one of {', '.join(FORMATS)}")
        if not 0.0 < self.dev_fraction < 1.0:
            raise ConfigError(f"data.dev_fraction: got {self.dev_fraction}, needs a number between 0 and 1")
        check_integer("data.vocab_size", self.vocab_size, 16, 2**31 - 1)
        if self.lowercase is not None:
            check_flag("data.lowercase", self.lowercase)

    @property
    def mapping(self) -> dict[str, str]:
        """Field -> column."""
        return dict(each.split("=", 1) for each in self.columns)

    @property
    def learnt(self) -> bool:
        """Whether the tokenizer is trained on the data."""
        return self.tokenizer in KINDS


@dataclass(frozen=True)
class LoraConfig:
    """Adapters in place of full training, see `fastattn.models.lora.attach`.

    Args:
        r: the rank; None trains all weights.
        alpha, dropout, rslora: as in `attach`.
        targets: names of layers, or "all-linear".
    """

    r: int | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r is not None:
            check_integer("lora.r", self.r, 1, 65536)
        if not 0.0 < self.alpha < 1e9:
            raise ConfigError(f"lora.alpha: got {self.alpha}, needs a number above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout: got {self.dropout}, needs a number within [0, 1)")
        if not self.targets:
            raise ConfigError('lora.targets: got none, needs names of layers or "all-linear"')


@dataclass(frozen=True)
class Sections:
    """Every option of a run."""

    train: TrainConfig
    task: Any
    data: DataConfig
    clean: CleaningConfig
    lora: LoraConfig
    model: GPTConfig | BertConfig | None = None  # a preset's config, with the changes of the section

    def to_yaml(self) -> str:
        """The sections as --config reads them, without the folders, which --out and --resume name."""
        sections = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {
            name: section.to_dict() if name == "model" else asdict(section)
            for name, section in sections.items()
            if section is not None
        }
        for options in values.values():
            options.update({key: list(value) for key, value in options.items() if isinstance(value, tuple)})
        for name in ("output_dir", "resume", "overwrite"):
            del values["train"][name]
        return yaml.safe_dump(values, sort_keys=False)


def read_sections(
    task: ModuleType,
    *,
    preset: str | None,
    file: str | None,
    overrides: Sequence[str],
    defaults: Mapping[str, Any],
) -> Sections:
    """The sections from defaults, a YAML file and overrides.

    Args:
        task: gives the section "task" its type.
        preset: the name of the model's preset; only a preset has a section "model".
        defaults: of TrainConfig. The default of max_epochs is used only if neither max_steps nor max_seconds is given.

    Raises:
        ConfigError: as `load_config`, and for an option out of range.
    """
    kinds = kinds_of(task, preset)
    start: dict[str, Mapping[str, Any]] = {}
    if preset is not None:
        start["model"] = presets_of(task)[1][preset]
    try:
        given = given_options(kinds, file=file, overrides=overrides)["train"]
        limited = any(given.get(name) is not None for name in ("max_steps", "max_seconds"))
        start["train"] = {**defaults, "max_epochs": None} if limited else defaults
        found = load_config(kinds, file=file, overrides=overrides, defaults=start)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from None
    return Sections(**found)


def kinds_of(task: ModuleType, preset: str | None) -> dict[str, type]:
    """The dataclass of each section; only a preset has a section "model"."""
    kinds: dict[str, type] = {
        "train": TrainConfig,
        "task": task.Options,
        "data": DataConfig,
        "clean": CleaningConfig,
        "lora": LoraConfig,
    }
    return kinds if preset is None else {**kinds, "model": presets_of(task)[0]}


def presets_of(task: ModuleType) -> tuple[type, Mapping[str, Mapping[str, Any]]]:
    """The config of a task's models, and its presets as fields by name."""
    return (GPTConfig, DECODERS) if GPT in task.MODELS else (BertConfig, ENCODERS)
