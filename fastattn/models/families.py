"""Loads the model of any folder; its config.json names the class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fastattn.models.checkpoint.folder import CONFIG, read_json
from fastattn.models.checkpoint.hub import resolve_folder
from fastattn.models.checkpoint.load import naming_file
from fastattn.models.checkpoint.pretrained import Pretrained
from fastattn.models.decoder import GPT
from fastattn.models.embedding import MODULES, BertForEmbedding
from fastattn.models.encoder import Bert
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.heads import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from fastattn.models.peft import ADAPTER_CONFIG, load_adapter

MODELS: tuple[type[Pretrained], ...] = (  # of a model_type alone, the first that has its family
    GPT,
    Bert,
    BertForPreTraining,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
    EncoderDecoder,
)


def load(
    path_or_id: str | Path, *, dtype: torch.dtype | str | None = None, quantize: str | None = None
) -> Any:
    """The model of a folder or hub repository, in eval mode: the class that its config.json names.

    "architectures" decides, and where no class of ours is that of any name there, "model_type". A folder in
    sentence-transformers' layout (modules.json) is a `BertForEmbedding`. One that holds an adapter in PEFT's format and
    no model is the model that its adapter_config.json names, with the adapter attached.

    Args:
        path_or_id: a folder, or a repository's name on the Hugging Face hub.
        dtype: of the weights, such as torch.bfloat16 or "bfloat16"; None for what config.json says.
        quantize: "int8" for inference with 8-bit weights; None for the weights as they are.

    Returns:
        A module of `fastattn.models`, on the CPU. A warning says so where "architectures" names no class of ours.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: there is no such folder or repository; no class of ours computes the model_type (mixtures of experts
            among them), before a weight is read; quantize is given for an adapter; or the folder does not fit, see
            `Pretrained.from_pretrained`.
    """
    folder = resolve_folder(path_or_id)
    if _holds_adapter(folder):
        if quantize is not None:
            raise ValueError(f"quantize: got {quantize!r}, which does not go with an adapter; merge it first")
        return load_adapter(load(_base_of(folder), dtype=dtype), folder)
    return class_for(folder).from_pretrained(folder, dtype=dtype, quantize=quantize)


def class_for(path_or_id: str | Path) -> type[Pretrained]:
    """The class that `load` makes of a folder or hub repository; no weight is read. Raises as `load` does."""
    folder = resolve_folder(path_or_id)
    if _holds_adapter(folder):
        return class_for(_base_of(folder))
    if (folder / MODULES).is_file():
        return BertForEmbedding
    try:
        return class_of(read_json(folder / CONFIG))
    except ValueError as error:
        raise ValueError(naming_file(error, folder / CONFIG)) from None


def _holds_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def _base_of(folder: Path) -> str:
    """The model that an adapter's folder names."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or Path(base).resolve() == folder.resolve():
        raise ValueError(
            f"pretrained model: {folder / ADAPTER_CONFIG}: base_model_name_or_path: got {base!r}, needs a model"
        )
    return base


def class_of(entries: dict[str, Any]) -> type[Pretrained]:
    """The class that config.json's architectures or else its model_type name; ValueError where there is none."""
    kind = entries.get("model_type")
    able = [cls for cls in MODELS if any(family.model_type == kind for family in cls.families)]
    if not able:
        known = sorted({family.model_type for cls in MODELS for family in cls.families})
        raise ValueError(f"model_type: got {kind!r}, needs one of {', '.join(known)}")
    assert isinstance(kind, str)
    names = entries.get("architectures") or []
    for name in names if isinstance(names, list) else []:
        for cls in able:
            if name in cls.names_of(kind):
                return cls
    if names:
        warnings.warn(
            f"architectures: no class of fastattn is {names!r}; loading the {kind} as {able[0].__name__}, without "
            f"what that class has more",
            stacklevel=3,
        )
    return able[0]
