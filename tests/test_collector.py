"""Collections of garbage pause while modules are imported, and only then."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from fastattn.collector import paused

PROGRAM = """
import contextlib, gc
started = []
gc.callbacks.append(lambda phase, info: started.append(phase))
{before}
import fastattn
print(len(started), gc.isenabled())
"""


def fail_while_paused() -> None:
    with paused():
        raise ImportError(f"collector on: {gc.isenabled()}")


@pytest.mark.parametrize("enabled", [True, False])
def test_what_was_before_is_back_also_after_an_error(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError, match="collector on: False"):
            fail_while_paused()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("before", ["", "gc.disable()"])
def test_importing_fastattn_starts_few_collections(before: str) -> None:
    """Those of the modules before the pause; torch's import alone would start hundreds."""
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    count, enabled = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) <= 2 * 20  # a start and a stop of each
    assert enabled == str(before == "")
