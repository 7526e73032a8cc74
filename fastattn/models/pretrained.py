"""Reading and writing encoders' folders: the rows of each family for a class, and parameters a folder may lack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastattn.models.bert_config import BertConfig
from fastattn.models.checkpoint import Family
from fastattn.models.checkpoint.encoder_names import DISCRIMINATOR
from fastattn.models.checkpoint.encoders import FAMILIES_OF
from fastattn.models.checkpoint.pretrained import Pretrained

Model = TypeVar("Model", bound="PretrainedEncoder")


class PretrainedEncoder(Pretrained):
    """`from_pretrained` and `save_pretrained` of a model whose config is a `BertConfig`."""

    config: BertConfig

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__name__ in FAMILIES_OF:  # a class made of one of ours reads the same folders
            cls.families = FAMILIES_OF[cls.__name__]

    @classmethod
    def from_pretrained(cls: type[Model], path_or_id: str | Path, **options: Any) -> Model:
        """As `Pretrained.from_pretrained`; labels are counted anew where num_labels or id2label change."""
        if "num_labels" in options:
            options.setdefault("id2label", None)
        elif "id2label" in options:
            options["num_labels"] = None
        return super().from_pretrained(path_or_id, **options)

    @classmethod
    def fitted(cls, config: BertConfig, family: Family, names: frozenset[str]) -> tuple[BertConfig, Family]:
        """With the row for the bias that the masked LM's output uses, where a file may hold two."""
        for row in cls.families:
            biases = [part.theirs[0] for part in row.parts if part.ours == "decoder.bias"]
            if row.model_type == family.model_type and biases and row is not family:  # the untied one's
                tied = next(part.theirs[0] for part in family.parts if part.ours == "decoder.bias")
                if biases[0] in names and (not config.tie_word_embeddings or tied not in names):
                    return config, row
        if DISCRIMINATOR in family.architectures and config.num_labels != 1:  # an encoder for another task
            plain = next(row for row in cls.families if row.model_type == family.model_type)
            return replace(config, token_dense=False, token_dropout=None, classifier_activation="gelu"), plain
        return config, family
