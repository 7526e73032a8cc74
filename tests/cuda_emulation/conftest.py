"""The fixtures through which tests reach emulated kernels."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_emulation import extension
from cuda_emulation.build import HERE, Library, build, missing_tool
from cuda_emulation.extension import EmulatedExtension


@pytest.fixture(scope="session")
def library_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled libraries: pytest's cache, or one that this run's processes share."""
    if reason := missing_tool():
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Path(cache.mkdir("cuda_emulation")) if cache else shared / "cuda_emulation"


@pytest.fixture(scope="session")
def built_extension(library_folder: Path) -> EmulatedExtension:
    """The whole extension for the CPU."""
    return extension.build(library_folder)


@pytest.fixture
def emulated_extension(
    built_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch
) -> EmulatedExtension:
    """The extension that the cuda backend's functions call during a test."""
    monkeypatch.setattr("fastattn.extension.module", lambda: built_extension.module)
    built_extension.configure()
    return built_extension


@pytest.fixture(scope="session")
def emulated(library_folder: Path) -> Callable[..., Library]:
    """emulated("name.cpp", "MACRO", ...): the library of this folder's name.cpp, built once per text and macros."""
    libraries: dict[tuple[str, ...], Library] = {}

    def get(source: str, *defines: str) -> Library:
        key = (source, *defines)
        if key not in libraries:
            libraries[key] = build(HERE / source, library_folder, defines)
        return libraries[key]

    return get
