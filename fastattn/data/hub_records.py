"""Examples of the `datasets` library: from the hub by name, or from a folder that save_to_disk wrote."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastattn.data.corpora import DataError

HUB = "hf:"
_SAVED = ("dataset_dict.json", "state.json")  # of a dict of splits, of one split
DEFAULT_SPLIT = "train"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in _SAVED)


def read_hub(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The examples of "hf:OWNER/NAME[/CONFIG][:SPLIT]", or of "hf:FOLDER[:SPLIT]", each with its place.

    Raises:
        DataError: the library is not installed, or it does not find the data set, config or split.
    """
    written, _, split = name.removeprefix(HUB).partition(":")
    if not written:
        raise DataError(f"{name}: needs hf:OWNER/NAME, optionally with /CONFIG and :SPLIT")
    if Path(written).is_dir():
        yield from read_saved(Path(written), split or None)
        return
    parts = written.split("/")
    path, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    datasets = _library(name)
    try:
        loaded = datasets.load_dataset(path, config, split=split or DEFAULT_SPLIT)
    except Exception as error:  # from the network, the hub or a dataset's builder
        raise DataError(f"{name}: cannot be loaded ({_reason(error)})") from None
    yield from _examples(loaded, name)


def read_saved(folder: Path, split: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The examples of a folder of `datasets.save_to_disk`, of the split, "train" by default, each with its place.

    Raises:
        DataError: the library is not installed, the folder cannot be read, or it has no such split.
    """
    datasets = _library(str(folder))
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # parsers of a damaged folder raise various exceptions
        raise DataError(f"{folder}: cannot be loaded ({_reason(error)})") from None
    if isinstance(loaded, dict):
        chosen = split or (DEFAULT_SPLIT if len(loaded) > 1 else next(iter(loaded)))
        if chosen not in loaded:
            raise DataError(f"{folder}: has no split {chosen!r}, needs one of {', '.join(loaded)}")
        loaded = loaded[chosen]
    elif split:
        raise DataError(f"{folder}: holds one split without a name, got {split!r}")
    yield from _examples(loaded, str(folder))


def _examples(loaded: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not hasattr(loaded, "features") or not hasattr(loaded, "__len__"):
        raise DataError(f"{name}: got a {type(loaded).__name__}, needs one split")
    if not len(loaded):
        raise DataError(f"{name}: holds no example")
    for number, example in enumerate(loaded, 1):
        fields = {key: _named(value, loaded.features.get(key)) for key, value in example.items()}
        yield f"{name}: row {number}", fields


def _named(value: Any, feature: Any) -> Any:
    """Class numbers replaced by the data set's names."""
    if hasattr(feature, "int2str"):
        return feature.int2str(value) if isinstance(value, int) and value >= 0 else value
    inner = getattr(feature, "feature", None)
    if inner is None and isinstance(feature, list) and len(feature) == 1:
        inner = feature[0]
    if inner is not None and isinstance(value, list):
        return [_named(each, inner) for each in value]
    return value


def _library(what: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{what}: needs the package datasets (pip install 'fastattn[train]')") from None


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
