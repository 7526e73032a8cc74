"""What `fastattn train` is given, and what is checked and made of it before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from fastattn.train.task_config import Sections
from fastattn.train.task_data import TaskData


@dataclass(frozen=True)
class Inputs:
    """The arguments of `fastattn train`.

    Attributes:
        task: its name, as "classify".
        train: files, folders or data sets.
        dev: the same; without any, a part of the training data is held out.
        model: a folder, a repository on the Hugging Face hub, or a preset's name.
        out: folder for the trained model and the files of the run.
        teacher: folder of a model to learn soft labels from.
        resume: "auto", or the folder of a checkpoint, to continue from.
        config: YAML file with the sections' options.
        overrides: options as "--section.key=value".
    """

    task: str
    train: tuple[str, ...]
    dev: tuple[str, ...]
    model: str
    out: str
    teacher: str | None = None
    resume: str | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass
class Prepared:
    """Everything a run needs, checked."""

    task: ModuleType
    inputs: Inputs
    sections: Sections
    data: TaskData
    model: nn.Module
    tokenizer: Any
    saved_tokenizer: Any  # the tokenizer that the run saves; None where the model's folder has it
    train_set: Any
    dev_set: Any
    about: dict[str, Any]  # what the run is made from, for its checkpoints
    notes: tuple[str, ...] = ()  # on what differs from the run that is resumed
