"""Encoders from folders and back: the class's row of each family, new heads by name, changes of the config."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastattn.models.bert_config import BertConfig
from fastattn.models.checkpoint import (
    LoadReport,
    Tensors,
    load_weights,
    open_weights,
    read_json,
    resolve_folder,
    save_model,
)
from fastattn.models.checkpoint.encoders import DISCRIMINATOR, FAMILIES_OF
from fastattn.models.checkpoint.folder import CONFIG
from fastattn.models.checkpoint.load import family_of
from fastattn.models.checkpoint.names import Family, Part

Model = TypeVar("Model", bound="PretrainedEncoder")
OUTPUTS = (
    "classifier",
    "qa_outputs",
    "seq_relationship",
    "decoder",
)  # the layers of a head that make its results
_NEW_HEAD = ("head.*", "pooler.*", *(f"{name}.*" for name in OUTPUTS))


class PretrainedEncoder:
    """`from_pretrained` and `save_pretrained` of a model whose `config` is a `BertConfig`."""

    config: BertConfig
    load_report: LoadReport  # of models that from_pretrained made

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | Path,
        *,
        new_head: bool = False,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Model:
        """A model in eval mode from a transformers folder or the hub; its `load_report` says what was left out.

        Args:
            path_or_id: a folder, or a repository's name on the hub.
            new_head: initialise the head's last layer, whatever the file has, and what else of the head it lacks; for
                fine-tuning. `load_report.new` names these parameters. Without it, a missing head is an error.
            dtype: of the parameters; None keeps the file's.
            changes: fields of the config in place of the folder's, as num_labels, id2label or hidden_dropout_prob.

        Raises:
            ValueError: no such folder or repository; a config that is not supported; tensors that are missing, left
                over, of another shape or not finite, all of them listed.
        """
        unknown = [name for name in changes if name not in {field.name for field in fields(BertConfig)}]
        if unknown:
            raise TypeError(f"{unknown[0]}: is no argument of from_pretrained and no field of BertConfig")
        folder = resolve_folder(path_or_id)
        entries = read_json(folder / CONFIG)
        family = _family(cls, entries, new_head)
        try:
            config = family.read_config(entries)
        except ValueError as error:
            raise ValueError(f"pretrained model: {folder / CONFIG}: {error}") from None
        if "num_labels" in changes and "id2label" not in changes:
            changes["id2label"] = None
        elif "id2label" in changes and "num_labels" not in changes:
            changes["num_labels"] = None
        config = replace(config, **changes)
        tensors = open_weights(folder)
        config = cls._adapted(config, folder, {family.plain(name) for name in tensors.names()})
        return cls._filled(config, family, tensors, new_head, dtype)

    @classmethod
    def _filled(
        cls: type[Model],
        config: BertConfig,
        family: Family,
        tensors: Tensors,
        new_head: bool,
        dtype: torch.dtype | None,
    ) -> Model:  # fmt: skip
        family = _with_bias_in_use(family, config, tensors)
        new: tuple[str, ...] = ()
        if new_head:
            family, new = _without_outputs(family), _NEW_HEAD
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        model.load_report = load_weights(model, config, family, tensors, new=new, dtype=dtype)  # type: ignore[assignment]
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers loads as the class of the config's family."""
        assert isinstance(self, nn.Module)
        family = self._family_to_write()
        bare = type(self).__name__ in ("Bert", "BertForEmbedding")
        save_model(self, self.config, family, directory, with_prefix=not bare)

    def _family_to_write(self) -> Family:
        """The row of the config's family; the discriminator's where token classification has its layers."""
        rows = [row for row in FAMILIES_OF[_name(type(self))] if row.model_type == self.config.model_type]
        if not rows:
            raise ValueError(
                f"model_type: got {self.config.model_type!r}, which has no {_name(type(self))} in transformers"
            )
        discriminates = self.config.token_dense and len(rows) > 1
        return rows[-1] if discriminates else rows[0]

    @classmethod
    def _adapted(cls, config: BertConfig, folder: Path, names: set[str]) -> BertConfig:
        """The config for a folder whose weights have these names."""
        return config


def _name(cls: type) -> str:
    """The class of FAMILIES_OF that a class is or is made from."""
    return next(base.__name__ for base in cls.__mro__ if base.__name__ in FAMILIES_OF)


def _family(cls: type, entries: dict[str, Any], new_head: bool) -> Family:
    """The class's row for a config.json: by architecture where several have its model type."""
    rows = FAMILIES_OF[_name(cls)]
    if new_head:
        rows = tuple(row for row in rows if DISCRIMINATOR not in row.architectures)
    try:
        first = family_of(entries, rows)
    except ValueError as error:
        raise ValueError(f"pretrained model: {error}") from None
    named = entries.get("architectures") or ()
    for row in rows:
        if row.model_type == first.model_type and any(name in row.architectures for name in named):
            return row
    return first


def _with_bias_in_use(family: Family, config: BertConfig, tensors: Tensors) -> Family:
    """The family for files that hold the output's bias twice: an untied output uses its own."""
    twice = [
        part
        for part in family.parts
        if part.ours == "decoder.bias" and not part.theirs[0].endswith("decoder.bias")
    ]
    names = {family.plain(name) for name in tensors.names()}
    for part in twice:
        own = part.theirs[0].removesuffix("bias") + "decoder.bias"
        if own in names and (not config.tie_word_embeddings or part.theirs[0] not in names):
            return _with_part(family, part, own)
    return family


def _with_part(family: Family, part: Part, theirs: str) -> Family:
    parts = tuple(replace(row, theirs=(theirs,)) if row is part else row for row in family.parts)
    return replace(family, parts=parts)


def _without_outputs(family: Family) -> Family:
    """The family whose files never have the head's last layer."""
    parts = tuple(
        replace(part, theirs=(f"(new) {part.ours}",)) if part.ours.split(".")[0] in OUTPUTS else part
        for part in family.parts
    )
    return replace(family, parts=parts)
