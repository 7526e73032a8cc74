"""torch's elementwise functions give the same bits in their first call in a process as in any other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastattn import vector_math

FORKS = 4  # of each function; without the set-up about one in twenty differs on a processor with AVX-512
FIRST_CALLS = f"""
import os
import torch
import fastattn
from fastattn import vector_math

def differs(function, dtype):
    x = torch.rand(1 << 16, dtype=dtype)
    return not torch.equal(function(x), function(x))

def in_a_fork(function, dtype):
    child = os.fork()
    if child == 0:
        os._exit(differs(function, dtype))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert torch.get_num_threads() == 2
print(*(
    function.__name__
    for function in vector_math.FUNCTIONS
    for dtype in (torch.float32, torch.float64)
    for _ in range({FORKS})
    if in_a_fork(function, dtype)
))
"""


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that have loaded torch and computed nothing"
)
def test_the_first_call_has_the_bits_of_any_other() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS],
        env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_setting_up_leaves_modes_and_defaults_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function gets an element of each dtype on the CPU, whatever the thread that imports has switched on."""
    called = []

    def record(x: torch.Tensor) -> None:
        called.append((x.device.type, x.dtype, x.shape))

    monkeypatch.setattr(vector_math, "FUNCTIONS", (record, record))
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        vector_math.set_up()
    assert called == [("cpu", dtype, (1,)) for dtype in (torch.float32, torch.float64) for _ in range(2)]
