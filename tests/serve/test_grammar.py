"""`response_format`: what a random model writes keeps to a schema or an expression, and what cannot is refused."""

from __future__ import annotations

import json
import re
import sys
import threading
from concurrent.futures import TimeoutError as TooLate
from typing import Any

import pytest
import torch

from fastattn.serve.in_time import InTime
from fastattn.serve.repetitions import nested_repetitions

pytest.importorskip("fastapi")

from fastattn.serve.grammar import GrammarMask

SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "kind": {"enum": ["river", "tower"]}},
    "required": ["open", "kind"],
    "additionalProperties": False,
}
EXPRESSION = "(river|tower) [0-9]{2,3}(\u20ac|!)"


def ask(client: Any, path: str = "completions", **body: Any) -> Any:
    given = {"prompt": "the"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = {"model": "chat", "max_tokens": 90, "seed": 4, **given, **body}
    return client.post(f"/v1/{path}", json=body)


def texts(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_text_keeps_to_the_format(client: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    for text in texts(ask(client, path, response_format=form, n=3)):
        found = json.loads(text)
        assert set(found) == {"open", "kind"}
        assert isinstance(found["open"], bool)
        assert found["kind"] in ("river", "tower")
    # which would leave no token behind the format
    model = client.app.state.models["chat"].engine.model
    settings = {**(model.generation_config or {}), "min_new_tokens": 80, "no_repeat_ngram_size": 1}
    monkeypatch.setattr(model, "generation_config", settings)
    form = {"type": "regex", "regex": EXPRESSION}
    written = texts(ask(client, path, response_format=form, n=3))
    assert all(re.fullmatch(EXPRESSION, text) for text in written), written


def test_formats_that_cannot_be_kept_to_are_refused(client: Any) -> None:
    pytest.importorskip("xgrammar")
    for form in (
        {"type": "xml"},
        {"type": "regex"},
        {"type": "regex", "regex": "(("},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}},
        {"type": "regex", "regex": "a^b"},
    ):
        response = ask(client, response_format=form)
        assert response.status_code == 400, form
        assert response.json()["error"]["param"] == "response_format"
    for name, value in (("ignore_eos", True), ("min_tokens", 1), ("no_repeat_ngram_size", 2)):
        response = ask(client, response_format={"type": "json_object"}, **{name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_any_json_object_is_an_object_with_little_white_space(client: Any) -> None:
    pytest.importorskip("xgrammar")
    model = client.app.state.models["chat"]
    make = model.grammars.constraint({"type": "json_object"})
    assert make is not None
    core, size = model.tokenizer.core, model.engine.vocab_size

    def follows(text: str, character: str) -> bool:
        ids = [token for one in text for token in core.encode(one).ids]
        processor = make()
        for count in range(len(ids) + 1):  # the first call knows the prompt alone
            scores = processor(torch.tensor([[0, *ids[:count]]]), torch.zeros(1, size))
        (token,) = core.encode(character).ids
        return bool(scores[0, token].isfinite())

    assert follows("", "{")
    assert not any(follows("", character) for character in '["1tn')
    assert follows("{", " ")
    assert not follows("{  ", " ")
    assert follows('{"a":', "[")


def test_without_xgrammar_the_error_names_the_extra(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    model = client.app.state.models["gpt"]
    monkeypatch.setattr(model.grammars, "_compiler", None)
    response = ask(client, model="gpt", response_format={"type": "json_object"})
    assert response.status_code == 400
    assert "fastattn[grammar]" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("expression", "product"),
    [
        ("(((a?){50}){50}){50}", 125_000),
        ("(?:(?:(?:a|){50}){50,}){2,50}x", 125_000),
        ("(b|((a*){30}c{0}){40})", 1200),
        ("((^a{0,50}){50}$){50", 2500),
        (r"(([)\]]?){9}\(?){9}", 81),
        ("([a-z]{1,20} ){1,100}", 1),
        (r"(\w{0,20} ){0,100}", 100),
        ("(((a){50}){50}){50}", 1),
        ("a{0,100000}", 1000),
        ("{5}|)(", 1),
    ],
)
def test_counts_within_each_other_are_multiplied_where_they_may_be_empty(
    expression: str, product: int
) -> None:
    assert nested_repetitions(expression) == product


NESTED = "(((a?){50}){50}){50}"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex", "regex": NESTED},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": NESTED}}},
        {
            "type": "json_schema",
            "json_schema": {"schema": {"anyOf": [{"type": "string", "pattern": NESTED}]}},
        },
    ],
)
def test_an_expression_that_would_stop_all_other_requests_is_refused(client: Any, form: Any) -> None:
    pytest.importorskip("xgrammar")
    response = ask(client, response_format=form)
    assert response.status_code == 400
    assert "the product 125000, needs 1000 at most" in response.json()["error"]["message"]


def test_a_mask_that_takes_too_long_ends_its_request_and_the_next_gets_a_thread_of_its_own() -> None:
    in_time, over = InTime(0.05), threading.Event()
    with pytest.raises(TooLate):
        in_time(lambda: over.wait(30.0))
    in_time.seconds = 30.0
    assert in_time(lambda: 3) == 3
    over.set()
    with pytest.raises(RuntimeError, match="broken"):
        in_time(broken)
    assert in_time(lambda: 4) == 4


def broken() -> None:
    raise RuntimeError("broken")


def test_a_slow_mask_is_the_requests_fault_and_is_not_logged(
    client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    chat = client.app.state.models["chat"]

    class Slow(GrammarMask):
        def __init__(self) -> None:
            self.in_time, self.seen = InTime(0.05), None

        def _follow(self, tokens: list[int]) -> bool:
            return over.wait(30.0)

    monkeypatch.setattr(chat.grammars, "constraint", lambda asked: Slow if asked else None)
    response = ask(client, response_format={"type": "json_object"}, n=3)
    over.set()
    assert response.status_code == 400
    assert "not found within" in response.json()["error"]["message"]
    assert not caplog.text
    assert ask(client, max_tokens=2).status_code == 200
