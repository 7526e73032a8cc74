"""What the log holds of requests, and the answer to those that wait at a stop."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serve_cases import client_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_holds_prompts_only_where_asked(
    folders: dict[str, Path], log_prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    models = load_all([folders["gpt"], folders["embed"]], ServeOptions())
    with (
        caplog.at_level("DEBUG", "fastattn"),
        client_of(models, ServeOptions(log_prompts=log_prompts)) as one,
    ):
        one.post("/v1/completions", json={"model": "gpt", "prompt": "a secret\nriver", "max_tokens": 1})
        one.post("/v1/embeddings", json={"model": "embed", "input": ["another secret"]})
    assert ("a secret\\nriver" in caplog.text) == log_prompts
    assert ("another secret" in caplog.text) == log_prompts


def test_attention_that_waits_at_a_stop_is_answered(folders: dict[str, Path]) -> None:
    models = load_all([folders["gpt"]], ServeOptions(drain=0.0))
    worker = models["gpt"].worker
    worker.start = lambda: None  # type: ignore[method-assign]  # a thread that never comes to the call
    answers: list[Any] = []
    with client_of(models, ServeOptions(drain=0.0)) as one:
        asking = threading.Thread(
            target=lambda: answers.append(one.post("/attention", json={"model": "gpt", "text": "a river"}))
        )
        asking.start()
        while not worker._calls:
            time.sleep(0.01)
        worker.stop()
        asking.join(30.0)
    (answer,) = answers
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
