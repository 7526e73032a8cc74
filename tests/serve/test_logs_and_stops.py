"""What the log holds of requests, and the answer to those that wait at a stop."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serve_cases
from engine_cases import Asked, finish, make_engine, make_model, random_ids
from serve_cases import client_of, events_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.serve.encoders import EncoderWorker, Job
from fastattn.serve.engine import TargetEngine
from fastattn.serve.engine.requests import Overloaded
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import Encoder, load_all


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


@pytest.mark.parametrize("secret", [{"seed": 2**70 + 1234567}, {"logit_bias": {"7" * 5000: 1}}])
def test_a_value_that_is_refused_is_not_logged(
    client: Any, secret: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "fastattn"):
        for path, given in (
            ("completions", {"prompt": "a"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            assert client.post(f"/v1/{path}", json={"model": "chat", **given, **secret}).status_code == 400
    assert not caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_the_servers_fault_and_logged(
    folders: dict[str, Path], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    models = load_all([folders["gpt"]], ServeOptions())
    models["gpt"].engine.model.ln_f.weight.data.fill_(float("nan"))
    body = {"prompt": "a secret river", "max_tokens": 3, "stream": stream}
    with client_of(models, ServeOptions()) as one:
        answer = one.post("/v1/completions", json=body)
    error = events_of(answer)[-1]["error"] if stream else answer.json()["error"]
    assert error["type"] == "server_error"
    assert stream or answer.status_code == 500
    assert "not finite" in caplog.text
    assert "secret" not in caplog.text


NAN_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "embeddings": ("embed", {"input": "a secret"}),
    "embeddings in base64": ("embed", {"input": ["a secret"], "encoding_format": "base64"}),
    "rerank": ("embed", {"query": "a secret", "documents": ["b"]}),
    "rerank by a score": ("score", {"query": "a secret", "documents": ["b"]}),
    "classify": ("classify", {"input": "a secret"}),
    "predict": ("tag", {"data": [{"text": "a secret"}]}),
    "attention": ("embed", {"text": "a secret"}),
    "attention of a decoder": ("gpt", {"text": "a secret"}),
}


@pytest.mark.parametrize("case", NAN_BODIES)
def test_numbers_that_are_not_finite_are_the_servers_fault_and_logged(
    folders: dict[str, Path], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, body = NAN_BODIES[case]
    models = load_all([folders[name]], ServeOptions())
    model = models[name]
    for weight in (model.model if isinstance(model, Encoder) else model.engine.model).parameters():
        weight.data.fill_(float("nan"))
    path = case.split()[0]
    with client_of(models, ServeOptions()) as one:
        answer = one.post("/v1/embeddings" if path == "embeddings" else f"/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "not finite" in caplog.text
    assert "secret" not in caplog.text


def test_an_error_within_an_encoder_is_the_servers_fault_and_logged(
    client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("input: a size within the model")

    model = client.app.state.models["embed"].model
    for module in (model, model.bert):
        monkeypatch.setattr(module, "forward", broken)
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/attention", {"text": "a"})):
        caplog.clear()
        answer = client.post(path, json={"model": "embed", **body})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "a size within the model" in caplog.text
    answer = client.post("/attention", json={"model": "gpt", "text": "a", "text_pair": "b"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text_pair")


def test_options_that_leave_no_token_are_the_clients_fault(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": "gpt", "prompt": "a", "temperature": 0, "repetition_penalty": 1e-40}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "no token is left" in answer.json()["error"]["message"]
    assert not caplog.text


def test_requests_that_have_not_begun_fail_at_a_stop_and_the_others_end() -> None:
    engine = make_engine(make_model(), pages=20, max_batch=1)
    runs, waits, late = (Asked(random_ids(5, seed), max_new_tokens=9) for seed in range(3))
    engine.submit(runs.request, waits.request)
    for _ in range(3):
        engine._step()
    engine.close()
    with pytest.raises(Overloaded, match="shutting down"):
        engine.submit(late.request)
    engine._step()
    assert isinstance(waits.error, Overloaded)
    finish(engine)
    assert (len(runs.tokens()), runs.error) == (9, None)


def test_a_continuation_that_lost_its_pages_ends_at_a_stop() -> None:
    engine = make_engine(make_model(), pages=8, max_batch=2)
    asked = [Asked(random_ids(20, seed), max_new_tokens=25) for seed in range(2)]
    engine.submit(*(each.request for each in asked))
    while not engine.stats()["preemptions"]:
        engine._step()
    assert engine.batch.waiting[0].made
    engine.close()
    finish(engine)
    assert [len(each.tokens()) for each in asked] == [25, 25]


def test_targets_that_wait_fail_at_a_stop_before_the_batch_ends(tmp_path: Path) -> None:
    engine = TargetEngine(serve_cases.save_encoder_decoder(tmp_path), max_batch=1)
    runs, waits = (Asked([5, 6], max_new_tokens=9) for _ in range(2))
    runs.request.on_output = lambda output: (engine.close(), runs.outputs.append(output))
    waits.request.on_output = lambda output: waits.outputs.append(replace(output, made=len(runs.tokens())))
    engine.submit(runs.request, waits.request)
    engine.run_batch()
    assert len(runs.tokens()) == 9
    assert isinstance(waits.error, Overloaded)
    assert waits.outputs[0].made == 1


def test_texts_that_wait_fail_at_a_stop_and_jobs_that_have_begun_end(client: Any) -> None:
    served = client.app.state.models["embed"].worker
    worker = EncoderWorker(served.task, served.model, served.tokenizer, batch_tokens=8, max_queue=9)
    answers: dict[str, Any] = {}
    for name in ("begun", "waiting"):
        examples = [{"text": "a river"}] * 3
        worker.submit(Job(examples, [5] * 3, {}, lambda found, name=name: answers.update({name: found})))
    worker.step()
    worker.close()
    for _ in range(3):
        worker.step()
    assert len(answers["begun"]) == 3
    assert isinstance(answers["waiting"], Overloaded)


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


def test_a_step_that_does_not_end_holds_no_stop_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, begun, over = make_engine(make_model(), pages=8), threading.Event(), threading.Event()
    monkeypatch.setattr("fastattn.serve.engine.worker.JOIN_SECONDS", 0.05)
    refused: list[Exception] = []
    engine.start()
    engine.call(lambda: begun.set() or over.wait(60.0), refused.append)  # type: ignore[func-returns-value]
    assert begun.wait(30.0)
    engine.call(lambda: None, refused.append)
    engine.stop()
    assert engine.alive
    assert "fastattn-engine did not end within" in caplog.text
    assert [type(error) for error in refused] == [Overloaded]
    over.set()
    assert engine._thread is not None
    engine._thread.join(30.0)
