"""Folders by name: a path, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_folder(path_or_id: str | Path) -> Path:
    """The folder itself, or a hub repository's files in the local cache, downloaded where they are missing."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(
            f"pretrained model: got {type(path_or_id).__name__}, needs the path of a folder or a repository's name"
        )
    folder, name = Path(path_or_id), str(path_or_id)
    if name and folder.is_dir():
        return folder
    if isinstance(path_or_id, Path) or folder.is_file() or name.count("/") > 1 or not name:
        raise ValueError(f"pretrained model: got {name!r}, which is not a folder")
    try:
        from huggingface_hub import snapshot_download

        found = Path(snapshot_download(name, allow_patterns=_PATTERNS))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "pytorch_model*.bin"]))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"pretrained model: got {name!r}, which is not a folder "
            f"and could not be fetched from the Hugging Face hub: {error}"
        ) from error
    return found
