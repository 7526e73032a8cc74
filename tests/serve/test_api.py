"""The HTTP API against the models in-process: schemas, streams, errors and limits."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import client_of, events_of

from numerics import assert_within_rule

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from fastattn.data import Tokenizer
from fastattn.generation import generate
from fastattn.models import BertForEmbedding, load
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all
from fastattn.tasks import predict

PROMPT = "the river runs"
JSON = {"Content-Type": "application/json"}


def complete(client: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "gpt", "prompt": PROMPT, "temperature": 0, **body}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def alone(folder: Path, prompt: str = PROMPT, **options: Any) -> tuple[list[int], list[int], Tokenizer]:
    tokenizer, model = Tokenizer.from_pretrained(folder), load(folder)
    ids = tokenizer.encode(prompt)
    made = generate(
        model, torch.tensor([ids]), batch_invariant=True, prefill_chunk_size=8, tokenizer=tokenizer, **options
    )
    return ids, made[0, len(ids) :].tolist(), tokenizer


def test_a_completion_is_what_generate_makes(client: Any, folders: dict[str, Path]) -> None:
    ids, made, tokenizer = alone(folders["gpt"], max_new_tokens=16)
    found = complete(client)
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    (choice,) = found["choices"]
    text = tokenizer.decode(made)
    assert choice == {"index": 0, "text": text.rstrip("\ufffd"), "logprobs": None, "finish_reason": "length"}
    total = len(ids) + len(made)
    assert found["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 16, "total_tokens": total}


def test_sampling_options_reach_the_model(client: Any, folders: dict[str, Path]) -> None:
    options = {"top_p": 0.9, "top_k": 30, "seed": 5, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    options["no_repeat_ngram_size"] = 1
    said = {"do_sample": True, "temperature": 0.7, "min_new_tokens": 12}
    _, made, tokenizer = alone(folders["gpt"], max_new_tokens=12, **said, **options)
    found = complete(client, max_tokens=12, min_tokens=12, temperature=0.7, **options)
    assert found["choices"][0]["text"] == tokenizer.decode(made).rstrip("\ufffd")


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_and_continuations_have_their_places(client: Any, as_ids: bool, folders: Any) -> None:
    prompts: list[Any] = [PROMPT, "a tower"]
    if as_ids:
        tokenizer = Tokenizer.from_pretrained(folders["gpt"])
        prompts = [tokenizer.encode(prompt) for prompt in prompts]
    together = complete(client, prompt=prompts, n=2, temperature=1, seed=3, max_tokens=6)
    assert sorted(c["index"] for c in together["choices"]) == [0, 1, 2, 3]
    for number, prompt in enumerate(prompts):
        single = complete(client, prompt=prompt, n=2, temperature=1, seed=3, max_tokens=6)
        texts = [c["text"] for c in single["choices"]]
        assert [c["text"] for c in together["choices"][2 * number : 2 * number + 2]] == texts
        assert texts[0] != texts[1]


def test_echo_and_logprobs_in_the_legacy_schema(client: Any, folders: dict[str, Path]) -> None:
    prompt = "the old town \u20ac"
    tokenizer, model = Tokenizer.from_pretrained(folders["gpt"]), load(folders["gpt"])
    found = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
    ids = tokenizer.encode(prompt)
    logits = model(torch.tensor([ids])).logits[0].detach().float().log_softmax(-1)
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert all(len(each) == len(ids) for each in logprobs.values())
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        expected = float(logits[place - 1, ids[place]])
        assert logprobs["token_logprobs"][place] == pytest.approx(expected)
        best = logprobs["top_logprobs"][place]
        name = logprobs["tokens"][place]
        assert best[name] == logprobs["token_logprobs"][place]
        assert len(best) in (2, 3)
        assert max(best.values()) == pytest.approx(float(logits[place - 1].max()))
    raw = b""
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        if token.startswith("bytes:"):
            raw += bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        else:
            assert prompt[offset : offset + len(token)] == token
            raw += token.encode()
    assert raw == prompt.encode()
    assert any(token.startswith("bytes:") for token in logprobs["tokens"])


def test_the_sums_of_lm_evaluation_harness_are_the_models(client: Any, folders: dict[str, Path]) -> None:
    """Its local-completions asks for a token more than it reads, and sums log-probabilities behind a context."""
    tokenizer, model = Tokenizer.from_pretrained(folders["gpt"]), load(folders["gpt"])
    pairs = [("the river", " runs to the sea"), ("who", " lives there?"), ("a tower in", " the")]
    encoded = [(tokenizer.encode(context), tokenizer.encode(ending)) for context, ending in pairs]
    asked = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    choices = complete(client, prompt=[context + ending for context, ending in encoded], **asked)["choices"]
    sums, plain, golden = [], [], []
    double = load(folders["gpt"]).double()
    for (context, ending), choice in zip(encoded, sorted(choices, key=lambda each: each["index"])):
        scores, best = (choice["logprobs"][n][len(context) : -1] for n in ("token_logprobs", "top_logprobs"))
        ids, targets = torch.tensor([context + ending]), torch.tensor(ending)[:, None]
        for one, found in ((model, plain), (double, golden)):
            logits = one(ids).logits[0, len(context) - 1 : -1].detach()
            found.append(logits.log_softmax(-1).gather(1, targets).sum())
        greedy = logits.argmax(-1).tolist() == ending
        assert all(score == max(top.values()) for score, top in zip(scores, best)) == greedy
        sums.append(sum(scores))
    assert_within_rule(torch.tensor(sums), torch.stack(plain), torch.stack(golden))


def test_logprobs_without_echo_begin_behind_the_prompt(client: Any) -> None:
    choice = complete(client, logprobs=0, max_tokens=4)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == 4
    assert logprobs["text_offset"][0] == len(PROMPT)
    for name, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        assert top == {name: logprob}
    echoed = complete(client, logprobs=0, max_tokens=4, echo=True)["choices"][0]["logprobs"]
    assert echoed["tokens"][-4:] == logprobs["tokens"]
    assert echoed["token_logprobs"][-4:] == logprobs["token_logprobs"]
    assert echoed["text_offset"][-4:] == logprobs["text_offset"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_adds_up_to_the_whole(client: Any, path: str) -> None:
    body: dict[str, Any] = {"model": "chat", "max_tokens": 40, "temperature": 1.2, "seed": 1, "n": 2}
    if path == "completions":
        body |= {"prompt": PROMPT, "logprobs": 1, "echo": True}
    else:
        body |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    whole = client.post(f"/v1/{path}", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = events_of(client.post(f"/v1/{path}", json={**body, **options}))
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        finishes = [each["finish_reason"] for each in mine]
        assert finishes == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if path == "completions":
            assert "".join(each["text"] for each in mine) == choice["text"]
            for key, wanted in choice["logprobs"].items():
                assert [x for each in mine for x in each["logprobs"][key]] == wanted
        else:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(e["delta"].get("content", "") for e in mine) == choice["message"]["content"]
            content = [x for each in mine[1:] for x in each["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]
            assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_stop_strings_end_a_completion_and_are_not_in_it(client: Any) -> None:
    text = complete(client, max_tokens=30)["choices"][0]["text"]
    stop = next(text[i : i + 2] for i in range(4, len(text) - 2))
    cut = complete(client, max_tokens=30, stop=[stop, "never there"])
    (choice,) = cut["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert cut["usage"]["completion_tokens"] < 30
    events = events_of(
        client.post(
            "/v1/completions",
            json={
                "model": "gpt",
                "prompt": PROMPT,
                "temperature": 0,
                "max_tokens": 30,
                "stop": stop,
                "stream": True,
            },
        )
    )
    assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]


def test_a_stop_string_may_be_a_special_token(client: Any) -> None:
    end = client.post("/tokenize", json={"model": "gpt", "prompt": "<|padding|>"}).json()["tokens"][0]
    body = {"max_tokens": 5, "logit_bias": {str(end): 100}, "stop": "<|padding|>"}
    found = complete(client, **body)
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ("stop", 1)
    body |= {"model": "gpt", "prompt": PROMPT, "stop": "<|padding|>."}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "holds the special token '<|padding|>'" in response.json()["error"]["message"]


def test_a_frequency_penalty_and_a_bias_change_tokens(client: Any) -> None:
    plain = complete(client, max_tokens=20)["choices"][0]["text"]
    assert complete(client, max_tokens=20, frequency_penalty=2.0)["choices"][0]["text"] != plain
    forced = complete(client, max_tokens=3, logit_bias={"40": 100})["choices"][0]["text"]
    assert len(set(forced)) == 1


def test_chat_uses_the_template(client: Any, folders: dict[str, Path]) -> None:
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    body = {"model": "chat", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body).json()
    ids, made, tokenizer = alone(folders["chat"], "<system>be<user>hi<assistant>", max_new_tokens=8)
    assert found["object"] == "chat.completion"
    message = found["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", tokenizer.decode(made).rstrip("\ufffd"))
    assert found["usage"]["prompt_tokens"] == len(ids)


def test_chat_without_a_template_is_refused(client: Any) -> None:
    body = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_embeddings(client: Any, folders: dict[str, Path]) -> None:
    texts = ["Anna lives in Berlin.", "so good a film", "a river"]
    model = BertForEmbedding.from_pretrained(folders["embed"])
    plain, golden = model.encode(texts), model.double().encode(texts)
    body: dict[str, Any] = {"model": "embed", "input": texts}
    found = client.post("/v1/embeddings", json=body).json()
    assert [each["index"] for each in found["data"]] == [0, 1, 2]
    vectors = [each["embedding"] for each in found["data"]]
    assert_within_rule(torch.tensor(vectors), plain, golden)
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 9
    packed = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    for each, vector in zip(packed["data"], vectors):
        raw = base64.b64decode(each["embedding"])
        assert list(struct.unpack(f"<{len(vector)}f", raw)) == pytest.approx(vector)
    short = client.post("/v1/embeddings", json={**body, "dimensions": 4}).json()["data"][0]["embedding"]
    assert len(short) == 4
    assert sum(x * x for x in short) == pytest.approx(1.0)
    assert short[0] / short[1] == pytest.approx(vectors[0][0] / vectors[0][1])


@pytest.mark.parametrize("model", ["embed", "score"])
def test_rerank_sorts_documents(client: Any, model: str) -> None:
    documents = ["a river", "Anna lives in Paris", "bad film"]
    body = {"model": model, "query": "where does Anna live?", "documents": documents}
    found = client.post("/rerank", json=body).json()
    scores = [each["relevance_score"] for each in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(each["index"] for each in found["results"]) == [0, 1, 2]
    for each in found["results"]:
        assert each["document"] == {"text": documents[each["index"]]}
    assert len(client.post("/v1/rerank", json={**body, "top_n": 1}).json()["results"]) == 1


def test_classify(client: Any, folders: dict[str, Path]) -> None:
    texts = ["Anna lives in Berlin.", "so good a film"]
    found = client.post("/classify", json={"model": "classify", "input": texts}).json()
    task = predict.task_of(folders["classify"])
    golden = task.predict(*predict.load_folder(folders["classify"], task), [{"text": text} for text in texts])
    for each, expected in zip(found["data"], golden):
        assert each["label"] == expected["labels"][0]["label"]
        assert sorted(each["probs"], reverse=True) == pytest.approx([e["score"] for e in expected["labels"]])
        assert each["num_classes"] == 3


def test_predict_has_the_body_of_the_command(client: Any, folders: dict[str, Path]) -> None:
    data = [{"text": text} for text in ("Anna lives in Berlin.", "so good a film")]
    found = client.post("/predict", json={"model": "tag", "data": data}).json()
    task = predict.task_of(folders["tag"])
    golden = task.predict(*predict.load_folder(folders["tag"], task), data)
    assert found["task"] == "tag"
    assert [list(p) for p in found["predictions"]] == [list(p) for p in golden]
    for ours, theirs in zip(found["predictions"], golden):
        assert [e["entity"] for e in ours["entities"]] == [e["entity"] for e in theirs["entities"]]
    refused = client.post("/predict", json={"model": "tag", "data": data, "top_k": 2})
    assert (refused.status_code, "top_k" in refused.json()["error"]["message"]) == (400, True)


def test_tokenize(client: Any, folders: dict[str, Path]) -> None:
    ids = Tokenizer.from_pretrained(folders["gpt"]).encode(PROMPT)
    body = {"model": "gpt", "prompt": PROMPT, "return_token_strs": True}
    found = client.post("/tokenize", json=body).json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 128)
    assert len(found["token_strs"]) == len(ids)
    chat = client.post(
        "/tokenize", json={"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    ).json()
    assert chat["tokens"] == Tokenizer.from_pretrained(folders["chat"]).encode("<user>hi<assistant>")
    encoder = client.post(
        "/tokenize", json={"model": "tag", "prompt": "Anna", "add_special_tokens": False}
    ).json()
    assert encoder["count"] == 1


def test_models_health_and_metrics(client: Any) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert cards["gpt"]["batch_invariant"] is True
    assert cards["gpt"]["max_model_len"] == 128
    assert client.get("/v1/models/gpt").json() == cards["gpt"]
    assert client.get("/v1/models/nobody").status_code == 404
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    complete(client, max_tokens=2)
    text = client.get("/metrics").text
    for name in (
        "fastattn_generated_tokens_total",
        "fastattn_pages_held",
        "fastattn_time_to_first_token_seconds",
    ):
        assert f'{name}{{model="gpt"}}' in text or f'{name}_count{{model="gpt"}}' in text
    assert 'fastattn_http_requests_total{route="/v1/completions",status="200"}' in text


def test_limits_of_a_server(folders: dict[str, Path]) -> None:
    options = ServeOptions(
        page_size=8, max_queue=1, max_body=200, max_tokens=5, api_key="s3cret", timeout=0.0
    )
    models = load_all([folders["gpt"]], options)
    with client_of(models, options) as client:
        body = {"prompt": PROMPT}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            response = client.post("/v1/completions", json=body, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        client.headers["Authorization"] = "Bearer s3cret"
        assert client.post("/v1/completions", json={"prompt": "a" * 300}).status_code == 413

        def chunks() -> Any:
            yield from (b" " * 100 for _ in range(3))

        assert client.post("/v1/completions", content=chunks(), headers=JSON).status_code == 413
        refused = client.post("/v1/completions", json={**body, "max_tokens": 6})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        late = client.post("/v1/completions", json=body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
        models["gpt"].engine.max_queue = 0
        full = client.post("/v1/completions", json=body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert full.json()["error"]["code"] == "queue_full"
        models["gpt"].engine.max_queue = 1
        events = events_of(client.post("/v1/completions", json={**body, "stream": True}))
        assert events[-1]["error"]["code"] == "deadline"


def test_embeddings_of_token_ids_are_those_of_the_text(client: Any) -> None:
    texts = ["the river runs", "a tower"]
    ids = [
        client.post("/tokenize", json={"model": "embed", "prompt": text}).json()["tokens"] for text in texts
    ]

    def embed(given: Any) -> Any:
        response = client.post("/v1/embeddings", json={"model": "embed", "input": given})
        assert response.status_code == 200, response.text
        return response.json()

    by_text, by_ids = embed(texts), embed(ids)
    assert by_ids == by_text
    assert by_ids["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert embed(ids[0])["data"] == embed(texts[0])["data"]


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_count_from_the_prompts_beginning_with_and_without_echo(client: Any, stream: bool) -> None:
    """OpenAI's legacy API does so; vLLM's counts from the beginning of the text that is returned."""
    body = {"model": "gpt", "prompt": PROMPT, "temperature": 0, "max_tokens": 4, "logprobs": 0}

    def offsets(echo: bool) -> list[int]:
        response = client.post("/v1/completions", json={**body, "echo": echo, "stream": stream})
        parts = events_of(response) if stream else [response.json()]
        return [at for part in parts for at in part["choices"][0]["logprobs"]["text_offset"]]

    echoed, plain = offsets(True), offsets(False)
    assert plain[0] == len(PROMPT)
    assert echoed[-len(plain) :] == plain
    assert echoed[0] == 0
