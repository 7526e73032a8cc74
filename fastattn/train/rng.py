"""Reproducibility: the state of all global random generators, and deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def seed_at(*place: int) -> int:
    """A seed for a place of a run, given as integers of at least 0: different places have unrelated ones."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators' states, that of `device` included, in types that torch.load(weights_only=True) takes."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    inner = {**numpy_state["state"], "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))}
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": inner},
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators to the result of `random_state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = {**state["numpy"]["state"], "key": state["numpy"]["state"]["key"].numpy().astype(np.uint32)}
    np.random.set_state({**state["numpy"], "state": inner})  # noqa: NPY002


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the generators start from `seed`; afterwards they are restored."""
    held = random_state(device)
    seed_all(seed)
    try:
        yield
    finally:
        restore_random_state(held, device)


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms only, if wanted; an operation without one raises.

    On a CUDA device a matrix product tests whether cuBLAS is deterministic: RuntimeError where it cannot be any more.
    """
    before = _deterministic()
    try:
        if wanted:
            allow_deterministic_cublas()
            torch.use_deterministic_algorithms(True)
            if device is not None and device.type == "cuda":
                _check_cublas(device)
        yield
    finally:
        if _deterministic() != before:  # torch imports its compiler to set it
            enabled, warn_only = before
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _deterministic() -> tuple[bool, bool]:
    """Whether deterministic algorithms are required, and whether torch then only warns."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def allow_deterministic_cublas() -> None:
    """Ask cuBLAS for workspaces with which it is deterministic; torch reads this once, at its first product on CUDA."""
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)


def _check_cublas(device: torch.device) -> None:
    one = torch.ones(1, 1, device=device)
    try:
        torch.mm(one, one)
    except RuntimeError as error:
        if CUBLAS_VARIABLE not in str(error):
            raise
        raise RuntimeError(
            f"deterministic=True: torch read {CUBLAS_VARIABLE} at this process's first product on CUDA, before it was"
            f" set; set {CUBLAS_VARIABLE}={CUBLAS_WORKSPACE} in the environment that starts the process, or make the"
            " Trainer before anything else runs on the GPU"
        ) from None
