"""The cache folder: the variable, then the system's place; files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastattn.cache import cache_dir, write_atomically


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert not cache_dir().exists()


@pytest.mark.parametrize(
    ("platform", "variable", "below"),
    [("linux", "XDG_CACHE_HOME", "fastattn"), ("win32", "LOCALAPPDATA", "fastattn/cache")],
)
def test_the_systems_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, below: str
) -> None:
    monkeypatch.delenv("FASTATTN_CACHE_DIR", raising=False)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache_dir() == tmp_path / below
    monkeypatch.delenv(variable)
    assert cache_dir().is_relative_to(Path.home())


def test_a_file_is_replaced_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    write_atomically(path, "old")
    assert path.read_text() == "old"

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
