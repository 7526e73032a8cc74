"""The probes and first steps for a GPU, run unchanged over the emulated extension."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation.extension import EmulatedExtension

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

from evidence import first_run, first_run_steps, kernel_runs, probes
from evidence.first_run_steps import Scale
from fastattn import backends

CPU = torch.device("cpu")
TINY = Scale(long=140, one_pass=140, heads=2, launches=2, bytes_rows=20)


@pytest.fixture(autouse=True)
def _as_emulated(emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 at head dims up to 128 is what the emulation has launches of."""
    monkeypatch.setattr(kernel_runs, "DTYPE", torch.float16)
    monkeypatch.setattr(first_run_steps, "PACKED", (1, 63, 65))
    for name, dims in (("HEAD_DIMS", (64, 128)), ("PANEL_DIMS", (128,)), ("VIEW_DIMS", (8, 72))):
        monkeypatch.setattr(first_run_steps, name, dims)


@pytest.mark.parametrize("name", ["1", "2", "3", "4", "5", "5b", "6", "6b", "7b", "9"])
def test_step(name: str) -> None:
    results = list(first_run.STEPS[name].run(backends.cuda_backend, CPU, TINY))
    assert results
    assert all(good for good, _ in results), results


@pytest.mark.parametrize("name", ["softmax", "cross-entropy"])
def test_probe(name: str) -> None:
    assert probes.DIRECTIONS[name].probe(backends.cuda_backend, CPU)


@pytest.mark.parametrize("number", [2, 1])
def test_probe_of_the_backward_at_one_size(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "HEAD_DIMS", (128,))
    assert "D128 S200" in probes.probe_backward(backends.cuda_backend, CPU, number)
