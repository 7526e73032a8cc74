"""The probes and the first steps on a GPU, run over the emulated extension: the very code, at the emulation's pace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation.extension import EmulatedExtension

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import first_run
import first_run_steps
import gpu_probes
from first_run_steps import Scale

from fastattn import backends

CPU = torch.device("cpu")
TINY = Scale(long=140, turns=140, heads=2, launches=2, bytes_rows=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "2", "4", "5", "6", "7", "9"])
def test_step(name: str, emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run_steps, "PACKED", (1, 63, 65))
    results = list(first_run.STEPS[name].run(backends.cuda_backend, CPU, TINY))
    assert results
    assert all(good for good, _ in results), results


@pytest.mark.parametrize("name", ["softmax", "cross-entropy"])
def test_probe(name: str, emulated_extension: EmulatedExtension) -> None:
    assert gpu_probes.DIRECTIONS[name].probe(backends.cuda_backend, CPU)


def test_probe_of_the_backward_at_one_size(
    emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_probes, "HEAD_DIMS", (128,))
    said: list[Any] = [gpu_probes.probe_backward(backends.cuda_backend, CPU, number) for number in (2, 1)]
    assert all("D128 S200" in text for text in said)
