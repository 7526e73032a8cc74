"""`response_format`: what a random model writes keeps to a schema or an expression, and what cannot is refused."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch

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
def test_text_keeps_to_the_format(client: Any, path: str) -> None:
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    for text in texts(ask(client, path, response_format=form, n=3)):
        found = json.loads(text)
        assert set(found) == {"open", "kind"}
        assert isinstance(found["open"], bool)
        assert found["kind"] in ("river", "tower")
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
    response = ask(client, response_format={"type": "json_object"}, ignore_eos=True)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "ignore_eos")


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
