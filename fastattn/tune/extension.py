"""Compiles the attention kernels of the CUDA extension for Hopper, for the cycle model."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastattn.cache import cache_dir
from fastattn.extension.archs import SM90_SUFFIX
from fastattn.extension.compiling import Plan, compile_one
from fastattn.extension.info import csrc_folder
from fastattn.extension.toolkit import Torch, find_toolkit
from fastattn.tune.cycles.report import Prediction, predict_cuda
from fastattn.tune.cycles.sass import tool

ARCH = "9.0a"


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    return "needs a CUDA toolkit with nvcc" if find_toolkit() is None else None


def attention_sources(head_dim: int | None = None, dtype: str = "bfloat16") -> list[Path]:
    """The sources of the attention kernels of a dtype."""
    name = f"attention_*_{dtype}_{head_dim or '*'}{SM90_SUFFIX}"
    return sorted((csrc_folder() / "instantiations").glob(name))


def predict_source(source: Path) -> list[Prediction]:
    """Every kernel of a source, compiled unless the cache has it. Raises BuildError where nvcc does."""
    toolkit = find_toolkit()
    assert toolkit is not None
    nothing = Torch("", toolkit.version, "", True, ())
    plan = Plan(csrc_folder(), toolkit, nothing, (ARCH,))
    objects = cache_dir() / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    made = compile_one(plan, source, objects)
    return [prediction for cubin in cubins_of(made.path) for prediction in predict_cuda(cubin)]


def cubins_of(path: Path) -> Iterator[bytes]:
    """The device code inside an object file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(path.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for cubin in sorted(Path(folder).iterdir()):
            yield cubin.read_bytes()
