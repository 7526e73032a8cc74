"""Folders by name: a path, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastattn.models.checkpoint.folder import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLED,
    ADAPTER_WEIGHTS,
    CONFIG,
    read_json,
)

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_OTHER_FORMATS = ["consolidated*", "original/*", "onnx/*", "openvino/*"]  # of the same weights


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
        found = _fetched(name, _PATTERNS)
        if pickles := list(_pickles_of(found)):
            found = _fetched(name, [*_PATTERNS, *pickles])
    except (
        Exception
    ) as error:  # those of the client library too, of no common type, as where nothing was reached
        raise ValueError(
            f"pretrained model: got {name!r}, which is not a folder "
            f"and could not be fetched from the Hugging Face hub: {error}"
        ) from error
    return found


def _fetched(name: str, patterns: list[str]) -> Path:
    """The folder in the local cache with those of a repository's files that match."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS))


def _pickles_of(found: Path) -> Iterator[str]:
    """Patterns of the pickled weights of each model, one of sentence-transformers' parts or an adapter among them,
    that was fetched without safetensors."""
    if (found / ADAPTER_CONFIG).is_file() and not (found / ADAPTER_WEIGHTS).is_file():
        yield ADAPTER_PICKLED
    for config in (*found.glob(CONFIG), *found.glob(f"*/{CONFIG}")):
        folder = config.parent
        weights = [path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS]
        if not weights and "model_type" in read_json(config):
            yield f"{'' if folder == found else f'{folder.name}/'}pytorch_model*.bin"


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a model's folder to a repository on the Hugging Face hub, made if needed; gives its address.

    Weights that the repository holds under other names go, in the same commit; a README.md that it has stays.

    Raises:
        ValueError: repo_id is not a name, or the hub refused or was not reached; the message names it.
    """
    if not isinstance(repo_id, str) or not repo_id or repo_id.count("/") > 1:
        raise ValueError(f"repo_id: got {repo_id!r}, needs a repository's name, 'user/name'")
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=getattr(address, "repo_id", repo_id),
            folder_path=folder,
            commit_message=commit_message or "Upload a model saved by fastattn",
            ignore_patterns=["README.md"] if api.file_exists(repo_id, "README.md") else None,
            delete_patterns=["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"],
        )
    except (
        Exception
    ) as error:  # those of the client library too, of no common type, as where nothing was reached
        raise ValueError(
            f"repo_id: {repo_id!r} could not be uploaded to the Hugging Face hub: {error}"
        ) from error
    return str(address)
