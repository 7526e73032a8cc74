"""`benchmarks/bench_serve.py`: every case runs in its small form, and what is wrong is counted."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bench_serve
from cases import serve, serve_faults
from measure.http_client import Answer, gaps, metric, p95
from report import figures, schema

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
PEERS = {
    "clients-16": serve.GENERATE,
    "clients-16-bfloat16": serve.GENERATE,
    "between-tokens": serve.BESIDE,
    "embeddings": serve.OFFLINE,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in serve.CASES if name != "clients-16-continuous"])
def test_small_forms_run_and_are_stored(name: str, tmp_path: Path) -> None:
    if PEERS.get(name) == serve.GENERATE:
        pytest.importorskip("transformers")
    options = ["--device", "cpu", "--quick", "--only", f"^{name}$", "--out", str(tmp_path)]
    assert bench_serve.main(options) == 0
    (stored,) = schema.load(tmp_path / "serve.json")["cases"]
    rows = {row["provider"]: row for row in stored["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert serve.OURS in rows
    assert PEERS.get(name, serve.OURS) in rows
    if name == "memory":
        assert min(row["peak_memory_mib"] for row in rows.values()) > 0
    if name == "faults":
        assert (rows[serve.OURS]["wrong"], rows[serve.OURS]["first"]) == (0, [])
        kinds = {kind.split()[0] for kind in rows[serve.OURS]["answers"]}
        assert kinds == {kind.split()[0] for kind in serve_faults.KINDS}


@pytest.mark.slow
def test_a_server_that_answers_wrong_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Healthy requests whose text is not the one they got alone."""
    post, asked = serve_faults.post, []

    async def changed(port: int, body: Any, *more: Any, **options: Any) -> Answer:
        answer = await post(port, body, *more, **options)
        asked.append(body)
        if len(asked) == 1:
            answer.body = json.dumps({"choices": [{"text": "something else"}]}).encode()
        return answer

    monkeypatch.setattr(serve_faults, "post", changed)
    case = serve.faults_case(True)
    (row,) = case["rows"]
    assert row["wrong"] > 0
    assert "healthy" in row["first"][0]
    target = {"provider": serve.OURS, "against": None, "wrong": 0}
    assert figures.verdict({**case, "target": target}).startswith("missed")
    assert figures.verdict({**case, "target": target, "rows": [{**row, "wrong": 0}]}) == "met"
    assert figures.goals({"target": target}) == ["≤ 0 wrong"]


@pytest.mark.slow
def test_pages_run_out_in_the_fault_run() -> None:
    with serve.served_gpt(serve.TINY, "--max-batch=8", "--kv-memory=1") as (port, _, _):
        assert asyncio.run(serve_faults.faults(port, 40))["wrong"] == []
        assert asyncio.run(metric(port, "generated_tokens_total")) > 0


def test_a_peer_that_fails_is_a_row_with_its_reason_and_ours_is_a_failure() -> None:
    def broken() -> float:
        raise RuntimeError("no such kernel")

    ok, gone = serve.rounds_of({serve.OURS: lambda: 1.0, "peer": broken}, 2)
    assert (ok["time_ms"]["median"], ok["time_ms"]["samples"]) == (1000.0, 2)
    assert (gone["status"], gone["reason"]) == ("unavailable", "RuntimeError: no such kernel")
    target = {"provider": serve.OURS, "against": "peer", "speed": 1.0}
    case = serve.entry("n", "l", {}, target, False, lambda: serve.rounds_of({serve.OURS: broken}, 2))
    assert [row["status"] for row in case["rows"]] == ["failed"]


def test_providers_take_turns() -> None:
    order: list[str] = []
    turns: Iterator[int] = iter(range(100))

    def sample(name: str) -> serve.Sample:
        return lambda: order.append(name) or float(next(turns) + 1)

    rows = serve.rounds_of({name: sample(name) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]  # of the first round none counts
    assert [row["time_ms"]["samples"] for row in rows] == [3, 3]


def test_percentiles_and_gaps() -> None:
    assert gaps(Answer(times=[1.0, 1.5, 3.0])) == [(1.5, 0.5), (3.0, 1.5)]
    assert math.isclose(p95([float(n) for n in range(101)]), 95.0)
    with pytest.raises(ValueError, match="got 1 of them"):
        p95([1.0])


def test_a_folder_that_cannot_be_served_gives_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="did not start"), serve.serving(tmp_path / "nothing"):
        pass
