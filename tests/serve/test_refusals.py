"""Requests that are wrong: the error's status, its form, and that it names what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

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
    options = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = client.post(path, **options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"] or part == error["param"]
    assert response.headers["x-request-id"]


def test_methods_that_a_path_has_not(client: Any) -> None:
    response = client.get("/v1/completions")
    assert (response.status_code, response.json()["error"]["type"]) == (405, "invalid_request_error")
