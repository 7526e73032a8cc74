"""The methods of every model for folders and the hub: from_pretrained, save_pretrained, push_to_hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from fastattn.models.checkpoint.families import family_for
from fastattn.models.checkpoint.hub import push_folder
from fastattn.models.checkpoint.load import load_model
from fastattn.models.checkpoint.names import Family
from fastattn.models.checkpoint.report import LoadReport
from fastattn.models.checkpoint.save import generation_entries, save_model
from fastattn.nn.int8 import check_kind, quantize_linears

Model = TypeVar("Model", bound="Pretrained")


class Pretrained:
    """A model whose class says which families' folders it reads and writes.

    Attributes:
        families: those that it loads; it is saved as config.model_type's, or else the first that can say its config.
        architectures: model_type -> the class name that config.json gets; the family's first where there is no entry.
        new_heads: patterns of parameters that a file may lack; they are initialised, and `load_report` names them.
        with_prefix: whether names in its files have the family's prefix; bare models' have not.
        generates: whether it writes a generation_config.json.
        load_report: of the folder it was loaded from.
        loaded_from: that folder; saving copies the tokenizer's files from there.
        generation_config: what that folder's generation_config.json holds; written again.
    """

    families: ClassVar[tuple[Family, ...]]
    architectures: ClassVar[Mapping[str, str]] = {}
    new_heads: ClassVar[tuple[str, ...]] = ()
    with_prefix: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    config: Any
    quantized: str | None = None  # what `quantize` set
    load_report: LoadReport | None = None
    loaded_from: Path | None = None
    generation_config: dict[str, Any] | None = None

    @classmethod
    def names_of(cls, model_type: str) -> tuple[str, ...]:
        """The names in "architectures" of a model type that are this class."""
        found = [
            name
            for family in cls.families
            if family.model_type == model_type
            for name in family.architectures
        ]
        return (*found, cls.architectures.get(model_type, found[0])) if found else ()

    @classmethod
    def fitted(cls, config: Any, family: Family, names: frozenset[str]) -> tuple[Any, Family]:
        """The config and rows for a folder whose tensors have these names, without the prefix.

        For classes with parts that folders of one config.json may have or lack.
        """
        return config, family

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        quantize: str | None = None,
        new: Sequence[str] = (),
        **changes: Any,
    ) -> Model:
        """A model in eval mode from a folder, ours or transformers', or from a repository on the Hugging Face hub.

        Args:
            path_or_id: the folder, or the repository's name.
            dtype: of the weights, such as torch.bfloat16 or "bfloat16": float32, bfloat16, float16 or float64; None for
                what config.json says.
            quantize: "int8" for inference with 8-bit weights, see `quantize`.
            new: patterns (fnmatch) of parameters to initialise whatever the folder holds, such as "classifier.*".
            **changes: fields of the config to change, such as num_labels.

        Returns:
            The model, on the CPU; its `load_report` says what was dropped and initialised.

        Raises:
            TypeError: an argument is of another type than it needs, or the config has no field of that name.
            ValueError: an argument is out of range, there is no such folder or repository, or the folder does not fit;
                the message names the file and everything in it that does not.
        """
        check_kind("quantize", quantize)
        model = cast(Model, load_model(cls, path_or_id, dtype=dtype, new=new, changes=changes))
        if quantize is not None:
            model.quantize(quantize)
        return model

    def quantize(self: Model, kind: str | None = "int8") -> Model:
        """Let inference multiply with weights rounded to 8 bits in the numbered layers, or with None as they are; self.

        A weight has a scale for each output and an activation, rounded too, one for each token. The weights themselves
        stay, for training mode, gradients, torch.compile and `save_pretrained`; in eval mode the rounded copies are
        used whether gradients are on or off. They are made once and again where a weight changed. A change through
        `weight.data` leaves no trace, so call this again after one.

        Raises:
            ValueError: kind is neither "int8" nor None.
        """
        quantize_linears(cast(nn.Module, self), kind)
        self.quantized = kind
        return self

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        tokenizer: Any = None,
        quantize: str | None = None,
    ) -> None:
        """Write the model's folder in transformers' format where its family has one; all files appear together.

        config.json, model.safetensors (several with an index over max_shard_size), generation_config.json for models
        that generate, README.md unless the folder has one that was edited, and a tokenizer's files. Other files in
        `directory` stay.

        Args:
            directory: the folder; made where there is none.
            max_shard_size: most bytes of a weights file, a number or text such as "500MB".
            tokenizer: any object with save_pretrained; None for the files of the folder the model was loaded from.
            quantize: "int8" writes the matrices of the numbered layers as 8-bit numbers with a scale for each output, a
                quarter of float32's bytes. Only this package reads such a folder, as weights rounded so and with
                `quantize`.

        Raises:
            TypeError: tokenizer or max_shard_size is of another type than it needs.
            ValueError: an argument is out of range, the model has adapters or parameters without values, or no format
                can say its config.
            OSError: writing failed; `directory` is as it was.
        """
        if any(".lora." in name for name, _ in cast(nn.Module, self).named_parameters()):
            raise ValueError(
                "model: has adapters; save those with save_adapter, or merge or detach them first"
            )
        family = family_for(self.config, self.families)
        generation = None
        if self.generates:
            generation = self.generation_config
            generation = generation_entries(self.config) if generation is None else generation
        save_model(
            cast(nn.Module, self),
            self.config,
            family,
            directory,
            architecture=self.architectures.get(family.model_type),
            with_prefix=self.with_prefix,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            tokenizer_from=self.loaded_from,
            generation=generation,
            quantize=quantize,
            files=self.extra_files(),
        )

    def extra_files(self) -> Mapping[str, bytes]:
        """Further files that a class writes, by path within the folder."""
        return {}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        max_shard_size: int | str = "5GB",
        tokenizer: Any = None,
    ) -> str:
        """Save the model and upload the folder to a repository on the Hugging Face hub, made if needed; its address.

        Args:
            repo_id: "user/name".
            private: of a repository that is made; None for the account's default.
            token: of the hub; None for the one that `huggingface-cli login` stored.
            commit_message: of the upload.
            max_shard_size, tokenizer: as in `save_pretrained`.

        Raises:
            ValueError: repo_id is not a name, or the hub refused; the message names it.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "model", max_shard_size=max_shard_size, tokenizer=tokenizer)
            return push_folder(
                Path(scratch) / "model", repo_id, private=private, token=token, commit_message=commit_message
            )
