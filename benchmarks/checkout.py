"""Makes the checkout importable for a benchmark script when fastattn is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
