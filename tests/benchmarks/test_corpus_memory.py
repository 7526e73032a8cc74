"""Memory of packing and training does not grow with the corpus."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import corpus_memory

ALLOWED = 0.5  # bytes of memory for each further byte of text would be 1 or more if the corpus were held


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads a process's peak from Linux")
def test_four_times_the_text_takes_the_same_memory(tmp_path: Path) -> None:
    small, large = corpus_memory.peaks([10.0, 40.0], tmp_path)
    grown = (large["peak_mib"] - small["peak_mib"]) * 2**20
    assert large["tokens"] > 3.5 * small["tokens"]
    assert grown < ALLOWED * 1e6 * (large["megabytes"] - small["megabytes"]), (small, large)


def test_the_page_has_what_is_stored() -> None:
    record = json.loads(corpus_memory.STORED.read_text(encoding="utf-8"))
    page = corpus_memory.PAGE.read_text(encoding="utf-8")
    assert corpus_memory.paragraph(record) in page
    assert corpus_memory.refreshed(page, record) == page
    assert corpus_memory.refreshed(page, {**record, "date": "1999-01-01"}) != page
