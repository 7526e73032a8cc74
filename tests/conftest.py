"""Shared by every test: helpers importable from tests/, Triton interpreted where there is no GPU, GPU tests skipped."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

try:  # a machine that only runs the GPU tests needs no hypothesis
    from hypothesis import settings
except ImportError:
    pass
else:  # the same examples in every run; FASTATTN_TEST_EXAMPLES asks for fresh ones where a test knows it
    settings.register_profile("repeatable", derandomize=True, database=None)
    settings.load_profile("repeatable")

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # torch reads it once, at the first product on CUDA
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is decorated
    torch.set_num_threads(1)  # test shapes are small, and test processes run side by side


def _triton_before_3_6() -> bool:
    try:
        found = version("triton").split(".")
    except PackageNotFoundError:
        return False
    return (int(found[0]), int(found[1])) < (3, 6)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cuda_backend: runs the CUDA extension by name; added by its parameters"
    )


def _names_cuda(item: pytest.Item) -> bool:
    """Whether a test is of the extension: by its file, or by a parameter that names its backend."""
    given = getattr(item, "callspec", None)
    named = [] if given is None else [given.params.get(name) for name in ("backend", "first", "second")]
    return item.path.name.startswith("test_cuda_") or "cuda" in named


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a newer Triton, or a GPU where there is none."""
    if _triton_before_3_6():  # torch 2.9's: its TMA, PTX and register allocation are not those the tests know
        old = pytest.mark.skip(reason="needs Triton 3.6 or newer")
        for item in items:
            if "newer_triton" in item.keywords:
                item.add_marker(old)
    for item in items:
        if "gpu" in item.keywords and _names_cuda(item):
            item.add_marker("cuda_backend")
    if HAS_GPU:
        items.sort(key=lambda item: "cuda_backend" in item.keywords)  # a hang there costs what comes after it
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector need not walk it, which takes 0.1 s each time
    that a test or a benchmark collects."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_plans() -> None:
    """The first call of every kind in a test takes the path that checks and chooses."""
    from fastattn.ops import plan

    plan.clear()


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    """A warning given once per process is given once per test."""
    from fastattn import backends

    backends._warned.clear()
    with warnings.catch_warnings():
        yield


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
