"""The fixture through which tests reach emulated kernels."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_emulation.build import HERE, Library, build, missing_tool


@pytest.fixture(scope="session")
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Library]:
    """emulated("name.cpp", "MACRO", ...): the library of this folder's name.cpp, built once per text and macros."""
    if reason := missing_tool():
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(cache.mkdir("cuda_emulation")) if cache else shared / "cuda_emulation"
    libraries: dict[tuple[str, ...], Library] = {}

    def get(source: str, *defines: str) -> Library:
        key = (source, *defines)
        if key not in libraries:
            libraries[key] = build(HERE / source, folder, defines)
        return libraries[key]

    return get
