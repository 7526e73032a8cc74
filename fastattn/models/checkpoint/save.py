"""A model written as a folder: config.json and weights under the family's names, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from fastattn.models.checkpoint.folder import CONFIG, WEIGHTS
from fastattn.models.checkpoint.names import Family, stored, to_file


def save_model(
    model: nn.Module,
    config: Any,
    family: Family,
    folder: str | Path,
    *,
    architecture: str | None = None,
    with_prefix: bool = True,
) -> None:
    """Write config.json and model.safetensors; an existing folder's files are replaced one by one, each atomically.

    Args:
        model: its parameters and persistent buffers all have rows in the family.
        config: what `family.write_config` and its `sizes` ask.
        folder: is made where it does not exist.
        architecture: the class name that config.json says; the family's first without it.
        with_prefix: False writes names without the family's prefix, as transformers' bare models (BertModel) have.
    """
    state = model.state_dict(keep_vars=True)
    state = {name: state[name].detach() for name in stored(model)}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    entries = {
        "model_type": family.model_type,
        "architectures": [architecture or family.architectures[0]],
        "dtype": str(dtype).removeprefix("torch."),
        **family.write_config(config),
    }
    tensors = {
        name if with_prefix else name.removeprefix(family.prefix): tensor.cpu().contiguous()
        for name, tensor in to_file(state, config, family).items()
    }

    def write(scratch: Path) -> None:
        safetensors.torch.save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    write_folder(Path(folder), write)


def write_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder next to `directory`, then move it, or its files, into place."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {directory} exists and is not a folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write(scratch)
        if not directory.exists():
            scratch.chmod(0o777 & ~_umask())
            scratch.rename(directory)
            return
        for file in sorted(scratch.iterdir()):
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
