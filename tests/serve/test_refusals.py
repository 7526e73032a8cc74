"""Requests that are wrong: the error's status, its form, and that it names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import serve_cases
from serve_cases import events_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from pydantic import ValidationError

from fastattn.serve import http
from fastattn.serve.errors import ApiError
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all

JSON = {"Content-Type": "application/json"}
REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "not JSON": ("/v1/completions", b"{", 400, "JSON"),
    "no object": ("/v1/completions", b"[]", 400, "body"),
    "not unicode": ("/v1/completions", b'{"model": "gpt", "prompt": "\xff"}', 400, ""),
    "a lone surrogate": ("/v1/completions", rb'{"model": "gpt", "prompt": "\ud800"}', 400, ""),
    "deep": ("/v1/completions", b'{"prompt":' + b"[" * 100000, 400, ""),
    "no prompt": ("/v1/completions", {"model": "gpt"}, 400, "prompt"),
    "empty prompt": ("/v1/completions", {"model": "gpt", "prompt": ""}, 400, "prompt"),
    "no prompts": ("/v1/completions", {"model": "gpt", "prompt": []}, 400, "prompt"),
    "ids and strings": ("/v1/completions", {"model": "gpt", "prompt": [1, "a"]}, 400, "prompt"),
    "an id too large": ("/v1/completions", {"model": "gpt", "prompt": [10**6]}, 400, "prompt"),
    "unknown name": ("/v1/completions", {"model": "gpt", "prompt": "a", "max_token": 1}, 400, "max_token"),
    "a path": ("/v1/completions", {"model": "../gpt", "prompt": "a"}, 404, "does not exist"),
    "temperature": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "temperature": -1},
        400,
        "temperature",
    ),
    "not finite": ("/v1/completions", b'{"model":"gpt","prompt":"a","temperature":NaN}', 400, "temperature"),
    "max_tokens": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "max_tokens": 128},
        400,
        "context length",
    ),
    "min_tokens": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "max_tokens": 3, "min_tokens": 4},
        400,
        "min_tokens: got 4, needs the 3 tokens",
    ),
    "long": ("/v1/completions", {"model": "gpt", "prompt": "a " * 300}, 400, "context length"),
    "logprobs": ("/v1/completions", {"model": "gpt", "prompt": "a", "logprobs": 21}, 400, "logprobs"),
    "n": ("/v1/completions", {"model": "gpt", "prompt": "a", "n": 9}, 400, "n: got 9"),
    "n greedy": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "n": 2, "temperature": 0},
        400,
        "n: got 2",
    ),
    "best_of": ("/v1/completions", {"model": "gpt", "prompt": "a", "best_of": 3}, 400, "best_of"),
    "stop": ("/v1/completions", {"model": "gpt", "prompt": "a", "stop": ""}, 400, "stop"),
    "bias": ("/v1/completions", {"model": "gpt", "prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    "seed": ("/v1/completions", {"model": "gpt", "prompt": "a", "seed": 2**70}, 400, "seed"),
    "stream_options": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "stream_options": {}},
        400,
        "stream",
    ),
    "a long key": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "logit_bias": {"9" * 5000: 1}},
        400,
        "logit_bias",
    ),
    "a bias": (
        "/v1/completions",
        {"model": "gpt", "prompt": "a", "logit_bias": {"5": 101}},
        400,
        "logit_bias",
    ),
    "an encoder": ("/v1/completions", {"model": "tag", "prompt": "a"}, 400, "model"),
    "no messages": ("/v1/chat/completions", {"model": "chat", "messages": []}, 400, "messages"),
    "a decoder": ("/v1/embeddings", {"model": "gpt", "input": "a"}, 400, "model"),
    "wrong head": ("/v1/embeddings", {"model": "tag", "input": "a"}, 400, "tag"),
    "an id beyond": ("/v1/embeddings", {"model": "embed", "input": [[1], [10**6]]}, 400, "input"),
    "no ids": ("/v1/embeddings", {"model": "embed", "input": []}, 400, "input"),
    "an empty list": ("/v1/embeddings", {"model": "embed", "input": [[1], []]}, 400, "input"),
    "too many ids": ("/v1/embeddings", {"model": "embed", "input": [5] * 4000}, 400, "input"),
    "ids of documents": ("/rerank", {"model": "embed", "query": "a", "documents": [1]}, 400, "documents"),
    "empty input": ("/v1/embeddings", {"model": "embed", "input": ["a", " "]}, 400, "input"),
    "dimensions": ("/v1/embeddings", {"model": "embed", "input": "a", "dimensions": 999}, 400, "dimensions"),
    "three labels": ("/rerank", {"model": "classify", "query": "a", "documents": ["b"]}, 400, "model"),
    "no text": ("/predict", {"model": "tag", "data": [{}]}, 400, "data.0"),
    "a field": ("/predict", {"model": "tag", "data": [{"text": "a", "x": "b"}]}, 400, "data.0"),
    "which model": ("/predict", {"data": [{"text": "a"}]}, 400, "model"),
    "nothing there": ("/v2/completions", {}, 404, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_in_openais_form(client: Any, case: str) -> None:
    path, body, status, part = REFUSED[case]
    options = {"content": body, "headers": JSON} if isinstance(body, bytes) else {"json": body}
    response = client.post(path, **options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"] or part == error["param"]
    assert response.headers["x-request-id"]


def test_methods_that_a_path_has_not(client: Any) -> None:
    response = client.get("/v1/completions")
    assert (response.status_code, response.json()["error"]["type"]) == (405, "invalid_request_error")
    assert response.headers["allow"] == "POST"


MANY = 3000
NULLS, PAIRS = [None] * MANY, {f"a{i}": None for i in range(MANY)}
WRONG_THROUGHOUT: dict[str, tuple[str, Any]] = {
    "prompts": ("/v1/completions", {"prompt": NULLS}),
    "ids": ("/v1/completions", {"prompt": [NULLS]}),
    "lists of ids": ("/v1/completions", {"prompt": [[None]] * MANY}),
    "names": ("/v1/completions", {"prompt": "a", **PAIRS}),
    "stops": ("/v1/completions", {"prompt": "a", "stop": NULLS}),
    "biases": ("/v1/completions", {"prompt": "a", "logit_bias": PAIRS}),
    "options of a stream": ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": PAIRS}),
    "messages": ("/v1/chat/completions", {"messages": NULLS}),
    "names of a message": ("/v1/chat/completions", {"messages": [{"role": "user", **PAIRS}]}),
    "parts of a message": ("/v1/chat/completions", {"messages": [{"role": "user", "content": NULLS}]}),
    "inputs": ("/v1/embeddings", {"input": NULLS}),
    "documents": ("/rerank", {"query": "a", "documents": NULLS}),
    "texts": ("/classify", {"input": NULLS}),
    "data": ("/predict", {"data": NULLS}),
    "fields of data": ("/predict", {"data": [PAIRS]}),
    "messages to tokenize": ("/tokenize", {"messages": NULLS}),
}


@pytest.mark.parametrize("case", WRONG_THROUGHOUT)
def test_a_body_that_is_wrong_throughout_costs_one_error(
    client: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pydantic kept one for each entry, a body of 4 MB stopped the server for seconds."""
    counts: list[int] = []

    def refusal(error: ValidationError) -> ApiError:
        counts.append(error.error_count())
        return ApiError(400, "")

    monkeypatch.setattr(http, "_refusal", refusal)
    path, body = WRONG_THROUGHOUT[case]
    assert client.post(path, json=body).status_code == 400
    assert counts
    assert max(counts) <= 4  # one for each kind of list that the name may hold


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_prompts_of_a_body_are_taken_together_where_the_queue_has_room(kind: str, tmp_path: Path) -> None:
    options = ServeOptions(max_batch=2, max_queue=4)
    save = serve_cases.save_gpt if kind == "decoder" else serve_cases.save_encoder_decoder
    save(tmp_path / "model")
    with serve_cases.client_of(load_all([tmp_path / "model"], options), options) as client:
        answer = client.post("/v1/completions", json={"prompt": ["a river"] * 20, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 20


@pytest.mark.parametrize(
    ("prompts", "n", "part"), [(5, 2, "1 to 4 with n of 2"), (10, 1, "1 to 9"), (4, 2, "")]
)
def test_prompts_times_n_are_limited(prompts: int, n: int, part: str, folders: dict[str, Path]) -> None:
    options = ServeOptions(max_inputs=9)
    with serve_cases.client_of(load_all([folders["gpt"]], options), options) as client:
        answer = client.post("/v1/completions", json={"prompt": ["a"] * prompts, "n": n, "max_tokens": 1})
    assert answer.status_code == (400 if part else 200), answer.text
    assert part in answer.text


def test_a_deep_error_names_its_place(client: Any) -> None:
    message = {"role": "user", "content": "hi", "colour": "red"}
    error = client.post("/v1/chat/completions", json={"model": "chat", "messages": [message]}).json()["error"]
    assert error["message"] == "messages.0.colour: unknown name"
    assert error["param"] == "messages"
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    error = client.post("/v1/chat/completions", json={"model": "chat", "messages": [message]}).json()["error"]
    assert error["message"].startswith("messages.0.tool_calls: is not supported")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("completions", ("n", "stream", "echo", "ignore_eos", "logprobs", "stop", "stream_options")),
        ("chat/completions", ("n", "stream", "logprobs", "ignore_eos", "tools")),
    ],
)
def test_null_stands_for_the_default(client: Any, path: str, names: tuple[str, ...]) -> None:
    body: dict[str, Any] = {"model": "chat", "temperature": 0, "max_tokens": 4}
    given = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    found = [
        client.post(f"/v1/{path}", json={**body, **given, **nulls}) for nulls in ({}, dict.fromkeys(names))
    ]
    assert [each.status_code for each in found] == [200, 200], found[1].text
    assert found[0].json()["choices"] == found[1].json()["choices"]


def test_a_message_of_the_server_may_come_back(client: Any) -> None:
    body: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    first = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    empty = {"audio": None, "function_call": None, "tool_calls": [], "annotations": []}
    for message in (first, {**first, **empty}):
        answer = client.post("/v1/chat/completions", json={**body, "messages": [*body["messages"], message]})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_chunks_before_the_usage_hold_null(client: Any, path: str) -> None:
    given = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    body = {"model": "chat", "max_tokens": 3, "stream": True, **given}
    options = {"include_obfuscation": False}
    plain = events_of(client.post(f"/v1/{path}", json={**body, "stream_options": options}))
    assert not any("usage" in event for event in plain)
    *chunks, last = events_of(
        client.post(f"/v1/{path}", json={**body, "stream_options": {**options, "include_usage": True}})
    )
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["completion_tokens"] == 3
