"""The first call of each op within a CUDA graph capture makes only runtime calls that a capture permits."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import HERE
from cuda_emulation.extension import EmulatedExtension


def test_first_calls(built_extension: EmulatedExtension, library_folder: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(HERE / "capture_calls.py"), str(library_folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("call", ["cudaDeviceGetAttribute", "cudaGetDriverEntryPointByVersion"])
def test_the_emulated_capture_refuses(built_extension: EmulatedExtension, call: str) -> None:
    library = ctypes.CDLL(str(built_extension.path))
    built_extension.capture(True)
    try:
        room = (ctypes.c_char * 64)()
        arguments = {
            "cudaDeviceGetAttribute": (room, 75, 90),
            "cudaGetDriverEntryPointByVersion": (
                b"cuTensorMapEncodeTiled",
                room,
                12000,
                ctypes.c_ulonglong(0),
                room,
            ),
        }
        unsupported = 900  # cudaErrorStreamCaptureUnsupported
        assert getattr(library, call)(*arguments[call]) == unsupported
    finally:
        built_extension.capture(False)
    assert getattr(library, call)(*arguments[call]) == 0
