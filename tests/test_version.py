"""fastattn.__version__ and dir(fastattn): what is installed, what is loaded on first use, at no cost to import."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastattn
from fastattn import cli, versions

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
    assert versions.version("fastattn") == declared()
    monkeypatch.delitem(vars(fastattn), "__version__", raising=False)
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == declared() + "\n"
    for text in (None, '[project]\nname = "theirs"\nversion = "9"\n'):
        if text is not None:
            (tmp_path / "pyproject.toml").write_text(text)
        monkeypatch.setattr(versions, "__file__", str(tmp_path / "fastattn" / "versions.py"))
        assert versions.version("fastattn") == "0+unknown"


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


LINKED = """
import importlib.metadata, json, sys
import torch

found = importlib.metadata.Distribution.from_name.__func__
def without_ours(cls, name):
    if name == "fastattn":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)
importlib.metadata.Distribution.from_name = classmethod(without_ours)

site, benchmarks = sys.argv[1:]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]  # the installed one is not there
sys.path[:0] = [site, benchmarks]
import fastattn
assert fastattn.__file__.startswith(site), fastattn.__file__
from fastattn.kernels import tuned
from fastattn.spec import AttentionCall, AttentionSpec
tuned.device_name = lambda arch: "A Card"
query = torch.empty(1, 2, 64, 64, dtype=torch.float16)
spec = AttentionSpec.of(AttentionCall(query, query, query)).replace(device="cuda", arch=90)
from fastattn import doctor
from report import schema
print(json.dumps({
    "own": fastattn.__version__,
    "winners": tuned.winners_for(spec),
    "machine": tuned.Machine.of("A Card", 90).fastattn,
    "doctor": [doctor.report()["fastattn"]["version"], doctor.report()["errors"]],
    "result": schema.new_result("attention", torch.device("cpu"), {})["versions"]["fastattn"],
}))
"""


def test_a_linked_checkout_without_metadata_runs_everywhere_a_version_is_asked_for(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "fastattn").mkdir(parents=True)
    for item in (ROOT / "fastattn").iterdir():
        if item.name not in ("__pycache__", "kernels"):
            (site / "fastattn" / item.name).symlink_to(item, target_is_directory=item.is_dir())
    (site / "fastattn" / "kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
    done = subprocess.run(
        [sys.executable, "-c", LINKED, str(site), str(ROOT / "benchmarks")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
        env={**os.environ, "FASTATTN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "own": declared(), "winners": {}, "machine": declared(), "doctor": [declared(), {}], "result": declared(),
    }  # fmt: skip


def test_versions_have_one_home() -> None:
    """importlib.metadata raises for a checkout that is only linked, so nothing else asks it."""
    named = re.compile(r"importlib[. ](?:import )?metadata")
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in ("fastattn", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if named.search(path.read_text(encoding="utf-8"))
    ]
    assert users == ["fastattn/versions.py"]


def test_a_package_under_another_distribution_name_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "odd_build.py").write_text('__version__ = "3.6.0"\n')
    (tmp_path / "broken_build.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.find("odd_build") == "3.6.0"
    assert versions.find("broken_build") is None
    assert versions.find("not_there_at_all") is None
    assert versions.version("not_there_at_all") == versions.UNKNOWN
