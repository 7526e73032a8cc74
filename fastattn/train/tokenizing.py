"""The tokenizers of a task's run: of a folder, trained on the data, or of a teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastattn.cache import write_atomically
from fastattn.data import DataError, Tokenizer, train_bpe, train_characters
from fastattn.data.encoding import InputTokenizer
from fastattn.data.input_tokenizers import train_input_tokenizer
from fastattn.data.tokenization import read_settings
from fastattn.data.vocabulary import check_texts_without, check_vocabulary
from fastattn.models import GPT, EncoderDecoder, families
from fastattn.models.checkpoint.folder import CONFIG, read_json
from fastattn.models.checkpoint.hub import resolve_folder
from fastattn.models.checkpoint.save import TOKENIZER_FILES
from fastattn.models.embedding import encoder_folder
from fastattn.tasks.training import config_of
from fastattn.train.sections import ConfigError
from fastattn.train.task_config import DataConfig, Sections
from fastattn.train.task_data import texts_of

SETTINGS = "tokenizer_config.json"


def saved_tokenizer(model: str, sections: Sections, task: ModuleType) -> Any:
    """The tokenizer of data.tokenizer, or of the model's folder."""
    kind = kind_of(task)
    folder: Any = sections.data.tokenizer
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"data.tokenizer: got {folder!r}, needs a folder, or with a preset wordpiece, bpe or characters"
        )
    if folder is None:
        folder = resolve_folder(model) if kind is Tokenizer else encoder_folder(model)
    return kind.from_pretrained(folder)


class Texts:
    """Every text of examples but their labels, however often it is gone through."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[str]:
        return (text for example in self.examples for text in texts_of(example))


class FolderTokenizer:
    """The tokenizer's files of a model's folder with what a run has changed of them.

    Args:
        folder: the model's.
        tokenizer: read from there; `changed` says whether its tokens are others now, and `max_length` is its new one.
    """

    def __init__(self, folder: Path, tokenizer: InputTokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files."""
        target = Path(directory)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)
        if self.tokenizer.changed:
            write_atomically(target / "tokenizer.json", self.tokenizer.core.to_str(pretty=True) + "\n")
        settings = {
            **read_settings(self.folder / SETTINGS),
            **({} if self.tokenizer.max_length is None else {"model_max_length": self.tokenizer.max_length}),
        }
        write_atomically(target / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def to_save(
    task: ModuleType, options: Any, preset: str | None, source: str, model: Any, tokenizer: Any, given: Any
) -> Any:
    """What writes the tokenizer's files of a run; None where the model writes those of its folder.

    The tokenizer gets the length that the run trains with, so that later readers of the folder take it.

    Args:
        task, options, preset, source, model: of the run; source is the model's folder.
        tokenizer: the model's.
        given: the tokenizer to save in any case, or None.
    """
    before = getattr(tokenizer, "max_length", None)
    if hasattr(task, "saved_length"):
        length = task.saved_length(model, tokenizer, options, new=preset is not None)
        tokenizer.max_length = before if length is None else length
    if given is not None or kind_of(task) is Tokenizer:
        return given
    if tokenizer.changed or tokenizer.max_length != before:
        return FolderTokenizer(encoder_folder(source), tokenizer)
    return None


def kind_of(task: ModuleType) -> Any:
    """The class of a task's tokenizers."""
    return Tokenizer if GPT in task.MODELS else InputTokenizer


def learnt_tokenizer(
    task: ModuleType, options: DataConfig, preset: str | None, texts: Texts, checkpoint: Path | None
) -> Any:
    """A tokenizer trained on the training texts; for a resumed run, the one that its weights were trained with."""
    if preset is None:
        raise ConfigError(
            f"data.tokenizer: got {options.tokenizer!r}, needs a preset, because a model's folder has its own tokens"
        )
    if checkpoint is not None:
        return kind_of(task).from_pretrained(checkpoint)
    if GPT in task.MODELS:
        if options.tokenizer == "characters":
            return train_characters(texts, options.vocab_size)
        if options.tokenizer not in (None, "bpe"):
            raise ConfigError(
                f"data.tokenizer: got {options.tokenizer!r}, {task.NAME} needs bpe, characters or a folder"
            )
        return train_bpe(texts, options.vocab_size)
    lowercase = not getattr(task, "WRITES", False) if options.lowercase is None else options.lowercase
    return train_input_tokenizer(
        options.tokenizer or "wordpiece", texts, options.vocab_size, lowercase=lowercase
    )


def check_fits(model: str, task: ModuleType, tokenizer: Any, texts: Iterable[str]) -> None:
    """Refuse a tokenizer of another model, and texts with a token that the model lacks; no weight is read."""
    if GPT in task.MODELS:
        size = read_json(resolve_folder(model) / CONFIG).get("vocab_size")
        needed = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    elif issubclass(families.class_for(resolve_folder(model)), EncoderDecoder):
        return  # its task checks both parts
    else:
        config, _ = config_of(model, families.class_for(encoder_folder(model)))
        size, needed = config.vocab_size, {"mask_token": tokenizer.mask_id}
    if not isinstance(size, int):
        return
    beyond = check_vocabulary("tokenizer", tokenizer.core, {"model": size})
    for name, token in needed.items():
        if token is not None and token >= size:
            raise DataError(f"tokenizer: its {name} has the id {token}, the model's vocab_size is {size}")
    check_texts_without(beyond, texts)


def teacher_of(folder: str, task: ModuleType) -> tuple[Any, Any]:
    """The teacher in a folder and its tokenizer."""
    cls = families.class_for(folder)
    if not issubclass(cls, task.MODELS):
        raise ConfigError(f"--teacher: {folder} holds a {cls.__name__}, needs a {task.MODELS[0].__name__}")
    kind = kind_of(task)
    return task.MODELS[0].from_pretrained(folder), kind.from_pretrained(folder)
