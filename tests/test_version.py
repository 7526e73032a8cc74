"""fastattn.__version__ and dir(fastattn): what is installed, what is loaded on first use, at no cost to import."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastattn
from fastattn import cli

ROOT = Path(__file__).resolve().parent.parent


def declared() -> str:
    found = re.search(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found is not None
    return found[1]


def test_the_version_is_the_installed_one() -> None:
    assert fastattn.__version__ == importlib.metadata.version("fastattn")


def test_a_checkout_without_metadata_knows_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert fastattn._version() == declared()
    monkeypatch.delitem(vars(fastattn), "__version__", raising=False)
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == declared() + "\n"
    for text in (None, '[project]\nname = "theirs"\nversion = "9"\n'):
        if text is not None:
            (tmp_path / "pyproject.toml").write_text(text)
        monkeypatch.setattr(fastattn, "__file__", str(tmp_path / "fastattn" / "__init__.py"))
        assert fastattn._version() == "0+unknown"


def test_dir_shows_what_is_loaded_on_first_use_and_each_name_is_there() -> None:
    names = dir(fastattn)
    assert {"models", "train", "integrations", "__version__", "attention", "reference"} <= set(names)
    assert set(fastattn.__all__) <= set(names)
    assert names == sorted(set(names))
    for name in names:
        getattr(fastattn, name)


def test_neither_costs_an_import_anything() -> None:
    script = (
        "import sys, json, torch; sys.modules.pop('importlib.metadata', None); before = set(sys.modules);"
        "import fastattn; dir(fastattn); print(json.dumps(sorted(set(sys.modules) - before)));"
        "fastattn.__version__; print('importlib.metadata' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    loaded, after = done.stdout.splitlines()
    assert "importlib.metadata" not in json.loads(loaded)
    assert not [name for name in json.loads(loaded) if name.startswith(("fastattn.models", "fastattn.train"))]
    assert after == "True"
