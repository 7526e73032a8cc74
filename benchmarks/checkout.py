"""Makes the checkout importable for a benchmark script when fastattn is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent


def make_importable() -> str:
    """Find fastattn installed, else in this checkout, with kernels/ as fastattn.kernels; says which it was.

    setup.py maps kernels/ into the package; without an install the package's search path gains the checkout instead.
    """
    how = "installed"
    if importlib.util.find_spec("fastattn") is None:
        sys.path.append(str(ROOT))
        how = "from the checkout"
    import fastattn

    if importlib.util.find_spec("fastattn.kernels") is None:
        fastattn.__path__.append(str(ROOT))
        how = "from the checkout"
    return how


def correct_interpreter() -> bool:
    """Repair the bfloat16 of an interpreted Triton with the tests' corrections; returns whether it did."""
    file = ROOT / "tests" / "kernels" / "triton_interpreter.py"
    if (
        os.environ.get("TRITON_INTERPRET") != "1"
        or not file.exists()
        or importlib.util.find_spec("triton") is None
    ):
        return False
    module = sys.modules.get("triton_interpreter")
    if module is None:
        spec = importlib.util.spec_from_file_location("triton_interpreter", file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["triton_interpreter"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    module.correction().install()
    return True
