"""Deterministic training on CUDA: cuBLAS is asked in time, and where it is too late the user is told what to set."""

import os
import subprocess
import sys

import pytest
import torch

from fastattn.train.rng import deterministic_algorithms


def test_a_deterministic_trainer_asks_cublas_before_anything_runs(make_trainer, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_trainer(out="a")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_trainer(out="b", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_trainer(out="c", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_too_late_for_a_deterministic_cublas_is_told(monkeypatch):
    """torch reads the variable once per process: set later, the first product under deterministic algorithms raises."""

    def product(left, right):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("set an environment variable, CUBLAS_WORKSPACE_CONFIG=:4096:8 or ...=:16:8")
        return left

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: ones(*sizes))
    monkeypatch.setattr(torch, "mm", product)
    late = deterministic_algorithms(True, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"deterministic=True.*environment that starts the process"), late:
        pytest.fail("nothing may run")
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False, torch.device("cuda")):
        pass


@pytest.mark.gpu
def test_a_process_that_multiplied_first_is_told(tmp_path):
    script = (
        "import torch; one = torch.ones(2, 2, device='cuda'); one @ one\n"
        "from fastattn.train.rng import deterministic_algorithms\n"
        "with deterministic_algorithms(True, one.device): pass"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    assert "environment that starts the process" in done.stderr
