"""What `fastattn serve` refuses before it loads anything, and the package that needs nothing of its extra."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serve_cases import save_gpt

from fastattn.cli import serve as command
from fastattn.console import InputError
from fastattn.serve import server
from fastattn.serve.engine import Engine
from fastattn.serve.options import ServeOptions, key_from_environment
from fastattn.serve.served import load_all


def serve(*folders: Path, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
    server.serve(folders, host, port, ServeOptions(**options), print)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(InputError, match=r"needs uvicorn: pip install 'fastattn\[serve\]'"):
        serve(tmp_path)


def test_the_engine_needs_no_package_of_the_extra() -> None:
    code = "import sys, fastattn.serve.served; print({'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_command_and_the_engine_have_the_defaults_of_the_options() -> None:
    wanted = {field.name: field.default for field in dataclasses.fields(ServeOptions)}
    for function in (command.serve, Engine.__init__):
        given = inspect.signature(function).parameters.values()
        shared = {each.name: each.default for each in given if each.name in wanted}
        assert len(shared) >= 4
        assert shared == {name: wanted[name] for name in shared}


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen on"):
        serve(tmp_path, port=taken.getsockname()[1])


def test_folders_that_cannot_be_served(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "gpt").mkdir(parents=True)
    folders = [tmp_path / "a" / "gpt", tmp_path / "b" / "gpt"]
    with pytest.raises(InputError, match="gpt: names two folders"):
        load_all(folders, ServeOptions())
    with pytest.raises(InputError, match=r"config\.json"):
        load_all(folders[:1], ServeOptions())
    with pytest.raises(InputError, match="no such folder"):
        serve(tmp_path / "nowhere")
    save_gpt(folders[0])
    with pytest.raises(InputError, match="kv_memory"):
        load_all(folders[:1], ServeOptions(kv_memory=1))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_API_KEY", "abc")
    assert key_from_environment() == "abc"
    monkeypatch.setenv("FASTATTN_API_KEY", "")
    assert key_from_environment() is None
