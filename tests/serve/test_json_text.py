"""Large answers are made while the event loop goes on."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from serve_cases import events_of

from fastattn.serve import completions, json_text, pooling
from fastattn.serve.json_text import PART, SMALL, json_response, pieces, written
from fastattn.serve.options import ServeOptions
from fastattn.serve.schemas import EmbeddingBody

VALUES: dict[str, Any] = {
    "scalars": [None, True, 1, -0.5, "a\u20ac\n"],
    "empty": [{}, [], {"a": [], "b": {}}, ""],
    "a long list": list(range(3 * PART + 1)),
    "as long as a part": [0.5] * PART,
    "a long object": {str(number): number for number in range(PART + 1)},
    "embeddings": {"data": [{"index": i, "embedding": [0.25] * 2000} for i in range(9)], "usage": {"n": 1}},
    "log-probabilities": {"choices": [{"top": [None, *({"a": -0.5, "b": -1.5} for _ in range(2 * PART))]}]},
    "mixed": [[1, [2, {"a": 3}]], 4, [5] * (PART + 1)],
}


@pytest.mark.parametrize(("entries", "here"), [(SMALL, True), (SMALL + 2, False)])
def test_small_answers_are_made_in_the_loop_and_large_ones_in_a_thread(
    entries: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(json_text, "written", lambda value: threads.append(threading.get_ident()) or "")
    half = [0.5] * (entries // 2)
    asyncio.run(json_response({"data": [{"embedding": half}, {"embedding": half}]}))
    assert [thread == threading.get_ident() for thread in threads] == [here]


@pytest.mark.parametrize("name", VALUES)
def test_the_text_is_that_of_json_in_small_parts(name: str) -> None:
    value = VALUES[name]
    parts = list(pieces(value))
    assert "".join(parts) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert max(part.count(",") for part in parts) <= PART


@pytest.mark.parametrize("place", [lambda x: x, lambda x: [x], lambda x: {"a": [{"b": [x] * (PART + 1)}]}])
def test_numbers_that_are_not_finite_are_refused(place: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        written(place(float("nan")))


def test_the_loop_goes_on_while_a_large_answer_is_made(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python lets another thread run every 5 ms; these vectors take several tenths of a second to build and write."""
    found = [{"embedding": [i + j / 7 for j in range(384)]} for i in range(2048)]

    async def run(*_: Any, **__: Any) -> Any:
        return found, 1

    monkeypatch.setattr(pooling, "run", run)
    model = client.app.state.models["embed"]
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def answer() -> bytes:
        ticking = asyncio.ensure_future(tick())
        body = EmbeddingBody(model="embed", input="a", dimensions=8)
        made = await pooling.embeddings(None, body, model, ServeOptions())  # type: ignore[arg-type]
        plain = await pooling.embeddings(None, EmbeddingBody(input="a"), model, ServeOptions())  # type: ignore[arg-type]
        assert len(made["data"][0]["embedding"]) == 8
        response = await json_response(plain)
        ticking.cancel()
        return response.body

    assert len(json.loads(asyncio.run(answer()))["data"]) == 2048
    assert ticks >= 10


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_prompts_are_made_in_a_thread(
    client: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Checked(completions.LegacyLogprobs):
        """Log-probabilities of a prompt, which nothing may compute where an event loop runs."""

        def __init__(self, *args: Any) -> None:
            assert not running()
            super().__init__(*args)

        def of(self, scores: Any, top: int) -> Any:
            assert len(scores) < 5 or not running()
            return super().of(scores, top)

    def running() -> bool:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return False
        return True

    monkeypatch.setattr(completions, "LegacyLogprobs", Checked)
    body = {
        "model": "gpt",
        "prompt": "the river runs",
        "max_tokens": 2,
        "logprobs": 1,
        "echo": True,
        "stream": stream,
    }
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    first = events_of(response)[0] if stream else response.json()
    assert len(first["choices"][0]["logprobs"]["tokens"]) > 5
