"""The worker of encoders: which texts run together, and that what fails or leaves takes nobody along."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from fastattn.data import DataError
from fastattn.serve.encoders import EncoderWorker, Job
from fastattn.serve.engine.requests import DeadlineError, Overloaded


class Task:
    """Gives each text back; refuses "bad", fails for "broken", and has no finite score for "nan"."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def predict(self, model: Any, tokenizer: Any, examples: Any, **options: Any) -> list[dict[str, Any]]:
        texts = [each["text"] for each in examples]
        self.calls.append(texts)
        assert options["batch_size"] == len(texts)
        if "bad" in texts:
            raise DataError("bad text")
        if "broken" in texts:
            raise ValueError("a size within the model")
        return [
            {"text": text, "score": [{"of": float(text)}] if text in ("nan", "inf") else 1} for text in texts
        ]


def job_of(*texts: str, tokens: int = 1, **more: Any) -> tuple[Job, list[Any]]:
    told: list[Any] = []
    examples = [{"text": text} for text in texts]
    return Job(examples, [tokens] * len(texts), more.pop("options", {}), told.append, **more), told


def make(batch_tokens: int = 8, max_queue: int = 8) -> tuple[EncoderWorker, Task]:
    task = Task()
    return EncoderWorker(task, SimpleNamespace(), SimpleNamespace(), batch_tokens, max_queue), task  # type: ignore[arg-type]


def texts(told: list[Any]) -> list[str]:
    (results,) = told
    return [each["text"] for each in results]


def test_texts_of_several_requests_run_together_up_to_their_tokens() -> None:
    worker, task = make(batch_tokens=8)
    (a, told_a), (b, told_b) = job_of("a", "b", tokens=3), job_of(*"cdef", tokens=2)
    c, told_c = job_of("g", options={"top_k": 1})
    for job in (a, b, c):
        worker.submit(job)
    worker.step()
    assert (task.calls, texts(told_a), told_b) == ([["a", "b", "c"]], ["a", "b"], [])
    worker.step()
    assert (task.calls[1], told_b, texts(told_c)) == (["g"], [], ["g"])
    worker.step()
    assert (task.calls[2], texts(told_b)) == (["d", "e", "f"], list("cdef"))
    assert worker.stats()["waiting"] == 0
    assert (worker.stats()["texts"], worker.stats()["prompt_tokens"]) == (7, 15)


def test_a_text_larger_than_a_batch_runs_alone() -> None:
    worker, task = make(batch_tokens=8)
    job, told = job_of("a", "b", tokens=20)
    worker.submit(job)
    worker.step()
    worker.step()
    assert (task.calls, texts(told)) == ([["a"], ["b"]], ["a", "b"])


def test_a_large_request_lets_the_others_have_their_turn() -> None:
    worker, task = make(batch_tokens=8)
    large, told_large = job_of(*"abcdef", tokens=8)
    (small, told_small), (other, told_other) = job_of("g"), job_of("h", "i", tokens=8)
    for job in (large, small, other):
        worker.submit(job)
    worker.step()
    worker.step()
    assert texts(told_small) == ["g"]
    while worker.busy:
        worker.step()
    assert task.calls == [["a"], ["g"], ["h"], ["b"], ["i"], ["c"], ["d"], ["e"], ["f"]]
    assert (texts(told_large), texts(told_other)) == (list("abcdef"), ["h", "i"])


@pytest.mark.parametrize(
    ("text", "kind", "logged"),
    [
        ("bad", DataError, ""),
        ("broken", ValueError, "a size within the model"),
        ("nan", RuntimeError, "predictions are not finite"),
        ("inf", RuntimeError, "predictions are not finite"),
    ],
)
def test_a_request_that_is_refused_or_fails_does_so_alone(
    text: str, kind: type[Exception], logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = make()
    (good, told_good), (bad, told_bad), (after, told_after) = job_of("a"), job_of("b", text), job_of("c")
    for job in (good, bad, after):
        worker.submit(job)
    worker.step()
    assert (texts(told_good), texts(told_after)) == (["a"], ["c"])
    assert type(told_bad[0]) is kind
    assert worker.stats()["waiting"] == 0
    assert logged in caplog.text
    assert bool(caplog.text) == bool(logged)


def test_late_and_cancelled_requests_are_dropped_and_a_full_queue_refuses() -> None:
    worker, task = make(max_queue=3)
    late, told_late = job_of("a", deadline=time.monotonic() - 1.0)
    gone, told_gone = job_of("b")
    gone.cancelled.set()
    kept, told = job_of("c")
    for job in (late, gone, kept):
        worker.submit(job)
    with pytest.raises(Overloaded):
        worker.submit(job_of("d")[0])
    worker.step()
    assert (task.calls, texts(told), told_gone) == ([["c"]], ["c"], [])
    assert isinstance(told_late[0], DeadlineError)


def test_the_thread_answers_drains_and_stops() -> None:
    worker, _ = make()
    worker.start()
    job, told = job_of("a")
    worker.submit(job)
    assert worker.drain(30.0)
    assert texts(told) == ["a"]
    with pytest.raises(Overloaded):
        worker.submit(job_of("b")[0])
    worker.stop()
    assert not worker.alive


def test_stopping_fails_what_waits() -> None:
    worker, _ = make()
    job, told = job_of("a")
    worker.submit(job)
    worker._stopped = True
    worker._work()
    assert isinstance(told[0], Overloaded)


def test_calls_that_wait_at_a_stop_are_refused() -> None:
    worker, _ = make()
    ran: list[str] = []
    refused: list[Exception] = []
    for _ in range(2):
        worker.call(lambda: ran.append("ran"), refused.append)
    worker.stop()  # its thread was never started
    assert ran == []
    assert [type(error) for error in refused] == [Overloaded, Overloaded]
    with pytest.raises(Overloaded):
        worker.call(lambda: None, refused.append)


def test_an_error_names_a_text_by_its_number_in_the_request() -> None:
    worker, task = make(batch_tokens=2)

    def predict(model: Any, tokenizer: Any, examples: Any, **options: Any) -> list[dict[str, Any]]:
        for number, each in enumerate(examples, 1):
            if each["text"] == "bad":
                raise DataError(f"text {number}: is bad")
        return [{} for _ in examples]

    task.predict = predict  # type: ignore[method-assign]
    job, told = job_of("a", "b", "c", "bad", "e")
    worker.submit(job)
    while worker.busy:
        worker.step()
    assert str(told[0]) == "text 4: is bad"
    assert isinstance(told[0], DataError)


def test_fewer_tokens_at_a_time_on_a_cpu(client: Any) -> None:
    import torch

    from fastattn.nn.unpadding import tokens_at_a_time

    assert client.app.state.models["embed"].worker.batch_tokens == tokens_at_a_time(torch.device("cpu"))
    assert tokens_at_a_time(torch.device("cpu")) < tokens_at_a_time(torch.device("cuda"))
