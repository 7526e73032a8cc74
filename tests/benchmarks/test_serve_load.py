"""`benchmarks/serve_load.py`: a server survives clients that misbehave, and answers the others right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import serve_load

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)


@pytest.mark.slow
def test_a_server_survives_clients_that_misbehave(tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    serve_load.save_model(folder, **serve_load.TINY)
    # few pages, so that requests lose theirs in between
    with serve_load.serving(folder, "--max-batch=8", "--kv-memory=1") as (port, _):
        report = asyncio.run(serve_load.faults(port, 120))
        assert report["wrong"] == []
        assert {name.split()[0] for name in report["answers"]} == {
            kind.split()[0] for kind in serve_load.KINDS
        }
        assert asyncio.run(serve_load.metric(port, "generated_tokens_total")) > 0
