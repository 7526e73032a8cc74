"""Which errors end a process's use of its device: CUDA's own list by code and by words, nothing that resembles it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from measure.device_errors import LOST, is_device_lost, lost_after

ADVICE = (  # what torch 2.11 adds to every CUDA error, whatever it is
    "\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/ for more information.\nCUDA kernel errors"
    " might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.\nFor"
    " debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
HARMLESS = [
    "CUDA error: invalid argument",
    "CUDA error: invalid configuration argument",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: too many resources requested for launch",
    "CUDA error: too many blocks in cooperative launch",
    "CUDA error: operation not permitted when stream is capturing",
    "CUDA error: operation not supported",
    "CUDA error: unknown error of mine",
    "CUDA out of memory. Tried to allocate 20.00 GiB",
    "Triton Error [CUDA]: out of memory",
    "Triton Error [CUDA]: invalid argument",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
    "backend='cuda' cannot run this call: some data or stride is a misaligned address",
    "the tests plant an illegal memory access and an illegal instruction",
    "query: got a misaligned address, needs a multiple of 16 bytes",
]


class WithCode(RuntimeError):
    """As torch.AcceleratorError is, which says the number of the error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.error_code = code


@pytest.mark.parametrize("code", LOST)
def test_every_error_after_which_the_process_must_end(code: int) -> None:
    words = LOST[code]
    assert is_device_lost(WithCode(code, "whatever it says"))
    assert is_device_lost(RuntimeError(f"CUDA error: {words}{ADVICE}"))
    assert is_device_lost(RuntimeError(f"Triton Error [CUDA]: {words}"))
    assert is_device_lost(RuntimeError(f"CUDA driver error: {words}"))
    accelerator = getattr(torch, "AcceleratorError", RuntimeError)
    assert is_device_lost(accelerator(f"CUDA error: {words}{ADVICE}"))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_resembles_them(text: str) -> None:
    advice = ADVICE.replace("cudaErrorIllegalAddress", "cudaErrorInvalidValue")
    assert not is_device_lost(RuntimeError(text))
    assert not is_device_lost(RuntimeError(text + advice))


@pytest.mark.parametrize("code", [1, 2, 9, 98, 209, 701, 703, 720, 800, 801, 900, 901])
def test_codes_of_calls_that_were_only_refused(code: int) -> None:
    assert not is_device_lost(WithCode(code, "CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("kind", [ValueError, AssertionError, OSError, KeyError])
def test_only_what_cuda_raises_is_an_error_of_the_device(kind: type[Exception]) -> None:
    assert not is_device_lost(kind("CUDA error: an illegal memory access was encountered"))


def test_the_device_is_asked_where_the_error_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def lost(device: Any) -> None:
        asked.append(device)
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert lost_after(AssertionError("out is off"), torch.device("cuda"))
    assert len(asked) == 1
    assert not lost_after(AssertionError("out is off"), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not lost_after(AssertionError("out is off"), torch.device("cuda"))
