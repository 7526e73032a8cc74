"""Options that have no effect without another one: given, they are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastattn.train.sections import ConfigError, given_options

# whether an option has an effect, and what it needs for one
Need = tuple[bool, str]


def check_effect(
    kinds: Mapping[str, type],
    found: Any,
    *,
    preset: str | None,
    teacher: str | None,
    dev: bool,
    decoder: bool,
    file: str | None,
    words: tuple[str, ...],
) -> None:
    """Refuse an option that changes nothing in this run.

    One of the command line is refused whatever its value, and one of the file where it is not the default, because the
    file of a run has every option.

    Args:
        kinds: the dataclass of each section.
        found: the sections, by attribute.
        preset, teacher: the arguments of the command.
        dev: whether there are files for the dev set.
        decoder: whether the task trains decoders, whose tokenizers keep the case.
        file, words: where the options are given.

    Raises:
        ConfigError: an option has no effect; the message names it and what it needs.
    """
    learns = preset is not None and (found.data.tokenizer is None or found.data.learnt)
    keeps_case = decoder or found.data.tokenizer == "bpe"
    lora = (found.lora.r is not None, "lora.r, as all weights are trained without it")
    taught = (teacher is not None, "--teacher")
    muon = (found.train.optimizer == "muon", "train.optimizer=muon")
    needs: dict[str, Need] = {
        **dict.fromkeys(("lora.alpha", "lora.dropout", "lora.targets", "lora.rslora"), lora),
        **dict.fromkeys(("task.distill_weight", "task.temperature"), taught),
        **dict.fromkeys(("train.muon_lr", "train.muon_momentum"), muon),
        "train.decay_ratio": (found.train.schedule == "wsd", "train.schedule=wsd"),
        "train.max_nonfinite": (found.train.on_nonfinite == "skip", "train.on_nonfinite=skip"),
        "data.vocab_size": (learns, "a preset whose tokenizer is trained on the data"),
        "data.lowercase": (
            learns and not (keeps_case and found.data.lowercase),
            "a preset whose tokenizer is trained on the data, and is no decoder's and not bpe",
        ),
        "data.dev_fraction": (not dev, "training data of which a part is held out, and --dev is given"),
        "lora.r": (
            found.lora.r is None or preset is None,
            "the folder of a trained model: the weights of a preset are random, and adapters leave them so",
        ),
    }
    by_words = given_options(kinds, overrides=words)
    by_file = given_options(kinds, file=file)
    for place, (good, need) in needs.items():
        section, _, key = place.partition(".")
        in_file = key in by_file[section] and by_file[section][key] != _default(kinds[section], key)
        if not good and (key in by_words[section] or in_file):
            raise ConfigError(f"{place}: has no effect in this run, needs {need}")


def _default(kind: type, key: str) -> Any:
    return next((field.default for field in dataclasses.fields(kind) if field.name == key), None)
