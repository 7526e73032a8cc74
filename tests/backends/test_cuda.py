"""The cuda backend's choice: what it refuses and why, and that "auto" takes it only where it was measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastattn import backends, extension
from fastattn.backends import cuda
from fastattn.backends.cuda import MeasuredRows
from fastattn.extension.info import BuildInfo
from fastattn.spec import SoftmaxSpec

SPEC = SoftmaxSpec("cuda", 90, torch.bfloat16, 4096, unit_columns=True, int64_offsets=False)
INFO = BuildInfo("2.11.0", "13.0", "abi", ("8.0", "9.0a"), "hash")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """state(...): what the process finds of an extension."""

    def put(**fields: Any) -> None:
        for place in ("fastattn.extension.state", "fastattn.extension.load.state"):
            monkeypatch.setattr(place, lambda: extension.State(**fields))

    return put


def test_the_order_is_the_policy() -> None:
    assert backends.NAMES == ("cuda", "triton", "torch")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu", "arch": None}, "device 'cpu' is not a CUDA device"),
        ({"arch": 75}, "compute capability 7.5 is below 8.0"),
        ({"dtype": torch.float64}, "dtype torch.float64 is not one of"),
        ({"arch": 120}, "the extension is built for 8.0, 9.0a, this GPU is 12.0; `fastattn build`"),
    ],
)
def test_refusals_name_their_reason(state: Callable[..., None], change: dict[str, Any], reason: str) -> None:
    state(info=INFO)
    assert cuda.why_not(SPEC) is None
    assert str(cuda.why_not(SPEC.replace(**change))).startswith(reason)


def test_without_an_extension_its_reason_is_the_backends(state: Callable[..., None]) -> None:
    state(reason="not built")
    assert cuda.why_not(SPEC) == "not built"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this call: not built"):
        backends.select(SPEC, "cuda", "softmax_fwd")


def test_auto_takes_it_only_where_it_was_measured(
    state: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    state(info=INFO, module=SimpleNamespace(softmax_plan=lambda *_: (16, 32, 8, 1)))
    monkeypatch.setattr("fastattn.backends.triton.why_not", lambda spec: None)
    explanation = backends.explanation({"softmax_fwd": SPEC}, "auto")
    assert explanation.backend == "triton"
    assert dict(explanation.refusals)["cuda"].startswith("not yet measured on this GPU")
    assert (
        backends.explanation({"softmax_fwd": SPEC}, "cuda").tiles
        == "a row on 256 threads, 16 elements a thread"
    )

    monkeypatch.setattr(cuda, "MEASURED_ROWS", (MeasuredRows(90, False, 1024, 4096),))
    assert cuda.why_not_auto(SPEC.replace(columns=1024)) is None
    assert cuda.why_not_auto(SPEC) is None
    assert backends.select(SPEC, "auto", "softmax_fwd") is cuda
    for columns in (512, 8192):
        assert "not measured to be faster" in str(cuda.why_not_auto(SPEC.replace(columns=columns)))
    for change in ({"arch": 80}, {"backward": True}):
        assert "not yet measured" in str(cuda.why_not_auto(SPEC.replace(**change)))
    assert "not adjacent in memory" in str(cuda.why_not_auto(SPEC.replace(unit_columns=False)))


def test_the_variable_forces_it(state: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    state(info=INFO)
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    with pytest.warns(RuntimeWarning, match="FASTATTN_BACKEND=cuda forces"):
        assert backends.select(SPEC, "auto", "softmax_fwd") is cuda


def test_importing_loads_no_extension() -> None:
    script = "import sys, fastattn; print('fastattn._C' in sys.modules, fastattn.extension.state.cache_info().misses)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["False", "0"]
