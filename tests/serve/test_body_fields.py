"""Fields of OpenAI's and vLLM's bodies beyond the common ones: what they do, or that they are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from serve_cases import client_of

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all

CHAT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
SAME: list[dict[str, Any]] = [
    {"tool_choice": "auto"},
    {"tool_choice": "none", "tools": []},
    {"function_call": "none", "functions": None},
    {"parallel_tool_calls": False},
    {"parallel_tool_calls": True},
    {"modalities": ["text"]},
    {"reasoning_effort": "none"},
    {"verbosity": "medium"},
    {
        "audio": None,
        "prediction": None,
        "web_search_options": None,
        "verbosity": None,
        "reasoning_effort": None,
    },
    {"prompt_cache_retention": "24h", "prompt_cache_key": "k", "safety_identifier": "s"},
    {"min_tokens": None, "stop_token_ids": None},
]
OTHERS: list[dict[str, Any]] = [
    {"tool_choice": "required"},
    {"functions": [{"name": "f"}]},
    {"modalities": ["text", "audio"]},
    {"reasoning_effort": "high"},
    {"verbosity": "low"},
    {"prediction": {"type": "content", "content": "a"}},
    {"web_search_options": {}},
    {"stop_token_ids": [10**6]},
    {"stop_token_ids": [-1]},
    {"min_tokens": 2, "stop": "a"},
    {"min_tokens": -1},
    {"top_p": -0.1},
]


@pytest.mark.parametrize("fields", SAME)
def test_fields_that_ask_for_what_is_done_anyway_change_nothing(client: Any, fields: dict[str, Any]) -> None:
    plain, found = (
        client.post("/v1/chat/completions", json={**CHAT, "seed": 3, **more}) for more in ({}, fields)
    )
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("fields", OTHERS)
def test_fields_that_ask_for_something_else_are_named(client: Any, fields: dict[str, Any]) -> None:
    answer = client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(fields)))


def tokens_of(client: Any, **more: Any) -> tuple[list[str], str]:
    """The tokens of a continuation and why it ended."""
    body = {
        "model": "gpt",
        "prompt": "the river runs",
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 0,
        **more,
    }
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["logprobs"]["tokens"], choice["finish_reason"]


def test_a_stop_token_ends_a_continuation_unless_too_few_tokens_are_made(client: Any) -> None:
    plain, _ = tokens_of(client, ignore_eos=True)
    place = next(i for i in range(1, 9) if plain[i] not in plain[:i])
    every = client.app.state.models["gpt"]
    (stop,) = (i for i in range(every.engine.vocab_size) if every.strings.string(i) == plain[place])
    for more in ({}, {"ignore_eos": True}):
        assert tokens_of(client, stop_token_ids=[stop], **more) == (plain[: place + 1], "stop")
    later, _ = tokens_of(client, stop_token_ids=[stop], min_tokens=place + 2)
    assert later[:place] == plain[:place]
    assert plain[place] not in later[: place + 2]
    assert len(later) >= place + 2


def test_a_top_p_of_0_takes_the_likeliest_token(client: Any) -> None:
    greedy = tokens_of(client)
    assert tokens_of(client, temperature=1.5, top_p=0, seed=5) == greedy


def test_an_unknown_name_in_a_part_of_a_message_is_refused(client: Any) -> None:
    part = {"type": "text", "text": "a", "colour": "red"}
    answer = client.post(
        "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": [part]}]}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "messages.0.content.0.colour: unknown name"


def test_tokenize_adds_special_tokens_to_messages_where_asked(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["chat"], tmp_path / "chat")
    path = str(tmp_path / "chat" / "tokenizer.json")
    core = tokenizers.Tokenizer.from_file(path)
    first = core.token_to_id("<|padding|>")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|padding|> $A", special_tokens=[("<|padding|>", first)]
    )
    core.save(path)
    with client_of(load_all([tmp_path / "chat"], ServeOptions()), ServeOptions()) as client:

        def ids(**more: Any) -> list[int]:
            found: list[int] = client.post("/tokenize", json={"messages": CHAT["messages"], **more}).json()[
                "tokens"
            ]
            return found

        plain = ids()
        assert plain[0] != first
        assert ids(add_special_tokens=False) == ids(add_special_tokens=None) == plain
        assert ids(add_special_tokens=True) == [first, *plain]
