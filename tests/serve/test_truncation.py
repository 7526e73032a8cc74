"""Texts that an encoder does not read to their end are refused, or truncated where a body asks for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

LONG = "the old river runs to the sea and " * 400
SHORT = "a tower in the old town"
# path, model, where the text stands, and what else the body holds
PLACES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "embeddings": ("/v1/embeddings", "embed", "input", {}),
    "classify": ("/classify", "classify", "input", {}),
    "documents": ("/rerank", "embed", "documents", {"query": SHORT}),
    "query": ("/rerank", "embed", "query", {"documents": [SHORT]}),
    "pairs": ("/rerank", "score", "documents", {"query": SHORT}),
}


def ask(client: Any, place: str, text: str, **more: Any) -> Any:
    path, model, name, rest = PLACES[place]
    given: Any = [text] if name == "documents" else text
    return client.post(path, json={"model": model, name: given, **rest, **more})


def longest(client: Any, place: str) -> int:
    return client.get(f"/v1/models/{PLACES[place][1]}").json()["max_model_len"]


@pytest.mark.parametrize("place", PLACES)
def test_a_text_that_is_too_long_is_refused_and_named(client: Any, place: str) -> None:
    answer = ask(client, place, LONG)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == PLACES[place][2]
    assert f"{longest(client, place)} at most" in error["message"]
    assert "truncate_prompt_tokens" in error["message"]
    assert ask(client, place, SHORT).status_code == 200


@pytest.mark.parametrize("place", PLACES)
def test_truncation_that_is_asked_for_counts_what_is_read(client: Any, place: str) -> None:
    counts = {}
    for most in (-1, longest(client, place), 9):
        answer = ask(client, place, LONG, truncate_prompt_tokens=most)
        assert answer.status_code == 200, answer.text
        counts[most] = answer.json()["usage"]["prompt_tokens"]
    assert counts[-1] == counts[longest(client, place)] > counts[9] >= 9
    assert counts[9] <= 2 * 9
    for most in (0, 1, longest(client, place) + 1):
        error = ask(client, place, SHORT, truncate_prompt_tokens=most).json()["error"]
        assert error["param"] == "truncate_prompt_tokens"
    assert ask(client, place, SHORT, truncate_prompt_tokens=-2).status_code == 400


def test_a_truncated_vector_is_that_of_the_first_tokens(client: Any) -> None:
    ids = client.post("/tokenize", json={"model": "embed", "prompt": LONG}).json()["tokens"]
    for most, asked in ((9, 9), (longest(client, "embeddings"), -1)):
        cut = ask(client, "embeddings", LONG, truncate_prompt_tokens=asked).json()["data"][0]["embedding"]
        kept = [*ids[: most - 1], ids[-1]]
        whole = client.post("/v1/embeddings", json={"model": "embed", "input": kept}).json()
        assert cut == whole["data"][0]["embedding"]


def test_a_text_that_is_embedded_is_tokenised_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = client.app.state.models["embed"].worker
    taken: list[dict[str, Any]] = []
    usual = worker.task.predict

    def predict(model: Any, tokenizer: Any, examples: list[dict[str, Any]], **options: Any) -> Any:
        taken.extend(examples)
        return usual(model, tokenizer, examples, **options)

    monkeypatch.setattr(worker, "task", SimpleNamespace(predict=predict))
    ids = client.post("/tokenize", json={"model": "embed", "prompt": SHORT}).json()["tokens"]
    both = client.post("/v1/embeddings", json={"model": "embed", "input": [SHORT, SHORT]}).json()["data"]
    assert taken == [{"ids": ids}] * 2
    found = usual(worker.model, worker.tokenizer, [{"text": SHORT}] * 2)
    assert [each["embedding"] for each in both] == [each["embedding"] for each in found]


def test_token_ids_are_not_truncated(client: Any) -> None:
    body = {"model": "embed", "input": [5] * 20, "truncate_prompt_tokens": 9}
    error = client.post("/v1/embeddings", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert client.post("/v1/embeddings", json={**body, "input": [5] * 9}).status_code == 200


def test_predictions_say_what_was_cut(client: Any) -> None:
    found = client.post("/predict", json={"model": "classify", "data": [{"text": LONG}]}).json()
    assert found["predictions"][0]["cut"] > 0
