"""Encoder-decoders behind /v1/completions: a request gets what `generate` gives its source alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serve_cases import client_of, events_of, save_encoder_decoder

from fastattn.console import InputError
from fastattn.data import Tokenizer, train_bpe
from fastattn.generation import stream_text
from fastattn.generation.options import Options
from fastattn.models import EncoderDecoder
from fastattn.serve.engine import Output, Request, TargetEngine
from fastattn.serve.engine.requests import DeadlineError, Overloaded
from fastattn.serve.options import ServeOptions
from fastattn.serve.served import load_all

PROMPTS = ["the river runs", "a tower in the old town", "who", "the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "targets"
    save_encoder_decoder(made)
    return made


@pytest.fixture(scope="module")
def client(folder: Path) -> Any:
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    options = ServeOptions(max_batch=3)
    with client_of(load_all([folder], options), options) as made:
        yield made


def alone(folder: Path, prompt: list[int], **options: Any) -> list[list[int]]:
    model = EncoderDecoder.from_pretrained(folder)
    made = model.generate(torch.tensor([prompt]), batch_invariant=True, eos_token_id=(), **options)
    return made[:, 1:].tolist()


class Asked:
    def __init__(
        self, prompt: list[int], *, copies: int = 1, deadline: float | None = None, **options: Any
    ) -> None:
        self.outputs: list[Output] = []
        made = Options(eos_token_id=(), **options)
        self.prompt, self.options = prompt, options
        self.request = Request(prompt, made, self.outputs.append, copies=copies, deadline=deadline)

    def tokens(self, index: int = 0) -> list[int]:
        return [token for out in self.outputs if out.index == index for token in out.tokens]

    @property
    def error(self) -> Exception | None:
        return next((out.error for out in self.outputs if out.error), None)


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(6, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine: TargetEngine, *asked: Asked) -> None:
    for each in asked:
        engine.submit(each.request)
    while engine.busy:
        engine.run_batch()


def test_tokens_are_those_of_generate_alone_whatever_else_runs(folder: Path) -> None:
    engine = TargetEngine(EncoderDecoder.from_pretrained(folder), max_batch=4)
    asked = [
        Asked(random_ids(9, 1), do_sample=False, max_new_tokens=20),
        Asked(random_ids(30, 2), do_sample=True, seed=5, top_p=0.9, max_new_tokens=9, repetition_penalty=1.3),
        Asked(random_ids(1, 3), do_sample=True, seed=6, max_new_tokens=5, copies=2),
        Asked(random_ids(17, 4), do_sample=False, max_new_tokens=39),
        Asked(random_ids(4, 5), do_sample=False, max_new_tokens=0),
    ]
    run(engine, *asked)
    for each in asked:
        assert each.error is None
        copies = each.request.copies
        own = {**each.options, **({"num_return_sequences": copies} if copies > 1 else {})}
        expected = alone(folder, each.prompt, **own)
        assert [each.tokens(i) for i in range(copies)] == expected
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


def test_what_fails_or_leaves_ends_alone(folder: Path) -> None:
    engine = TargetEngine(EncoderDecoder.from_pretrained(folder), max_batch=8)

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    good = Asked(random_ids(9, 1), do_sample=False, max_new_tokens=20)
    bad = Asked(random_ids(9, 2), do_sample=False, max_new_tokens=20, logits_processor=broken)
    late = Asked(random_ids(9, 3), max_new_tokens=20, deadline=time.monotonic() - 1.0)
    gone = Asked(random_ids(9, 4), do_sample=False, max_new_tokens=20)
    gone.request.on_output = lambda output: gone.request.cancel()
    run(engine, good, bad, late, gone)
    assert str(bad.error) == "broken"
    assert isinstance(late.error, DeadlineError)
    assert [good.tokens()] == alone(folder, good.prompt, do_sample=False, max_new_tokens=20)
    assert len(gone.request.sequences[0].made) == 1


def test_an_error_of_a_batch_ends_the_request_that_it_is_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EncoderDecoder.from_pretrained(folder)
    engine, encode = TargetEngine(model), model.continuation

    def breaks(ids: torch.Tensor, mask: torch.Tensor) -> Any:
        if (ids == 7).any():
            raise RuntimeError("broken")
        return encode(ids, mask)

    monkeypatch.setattr(model, "continuation", breaks)
    good, bad = Asked(random_ids(9, 1), max_new_tokens=4), Asked([7], max_new_tokens=4)
    run(engine, good, bad)
    assert str(bad.error) == "broken"
    assert [good.tokens()] == alone(folder, good.prompt, max_new_tokens=4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("broken")])
def test_a_step_that_fails_for_a_batch_goes_on_for_each_request_alone(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EncoderDecoder.from_pretrained(folder)
    engine, encode = TargetEngine(model), model.continuation
    steps: list[int] = []

    def scarce(*given: Any) -> Any:
        target, start = encode(*given)
        make = target.decoder

        def decoder(rows: int, *more: Any, **options: Any) -> Any:
            made = make(rows, *more, **options)
            step = made.step

            def one(tokens: torch.Tensor) -> torch.Tensor:
                steps.append(rows)
                if rows > 2 and steps.count(rows) == 3:
                    raise error
                return step(tokens)

            made.step = one
            return made

        return SimpleNamespace(decoder=decoder), start

    monkeypatch.setattr(model, "continuation", scarce)
    asked = [
        Asked(random_ids(9, 1), do_sample=False, max_new_tokens=8),
        Asked(random_ids(4, 2), do_sample=True, seed=3, copies=2, max_new_tokens=7, repetition_penalty=1.3),
        Asked(random_ids(6, 3), do_sample=False, max_new_tokens=2),
    ]
    run(engine, *asked)
    monkeypatch.undo()
    for each in asked:
        copies = each.request.copies
        own = {**each.options, **({"num_return_sequences": copies} if copies > 1 else {})}
        assert each.error is None
        assert [each.tokens(i) for i in range(copies)] == alone(folder, each.prompt, **own)
        assert sum(out.finish is not None for out in each.outputs) == copies


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    model = EncoderDecoder.from_pretrained(folder)
    engine = TargetEngine(model, max_batch=2, max_queue=1)
    for asked, named in (
        (Asked([], max_new_tokens=1), "prompt"),
        (Asked([10**6], max_new_tokens=1), "prompt"),
        (Asked([1] * 41, max_new_tokens=1), "max_tokens"),
        (Asked([1], max_new_tokens=40), "max_tokens"),
        (Asked([1], max_new_tokens=1, do_sample=True, copies=3), "n: got 3"),
    ):
        with pytest.raises(ValueError, match=named):
            engine.submit(asked.request)
    engine.submit(Asked([1], max_new_tokens=1).request)
    with pytest.raises(Overloaded):
        engine.submit(Asked([1], max_new_tokens=1).request)
    with pytest.raises(ValueError, match="max_batch"):
        TargetEngine(model, max_batch=0)


def test_stopping_fails_what_waits(folder: Path) -> None:
    engine = TargetEngine(EncoderDecoder.from_pretrained(folder))
    asked = Asked([9], max_new_tokens=4)
    engine.submit(asked.request)
    engine._stopped = True
    engine._work()
    assert isinstance(asked.error, Overloaded)


def complete(client: Any, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": "targets", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response


def test_completions_are_targets_of_the_prompts(client: Any, folder: Path) -> None:
    tokenizer, model = Tokenizer.from_pretrained(folder), EncoderDecoder.from_pretrained(folder)
    found = complete(client, prompt=PROMPTS, max_tokens=12, ignore_eos=True, logprobs=2).json()
    for choice, prompt in zip(found["choices"], PROMPTS, strict=True):
        ids = torch.tensor([tokenizer.core.encode(prompt).ids])
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": (), "batch_invariant": True}
        assert choice["text"] == "".join(stream_text(model, ids, tokenizer=tokenizer, **options))
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["text_offset"][0] == 0
    lengths = [len(tokenizer.core.encode(prompt).ids) for prompt in PROMPTS]
    assert found["usage"]["prompt_tokens"] == sum(lengths)
    assert client.get("/v1/models/targets").json()["batch_invariant"] is True
    assert (
        client.post("/tokenize", json={"model": "targets", "prompt": "the sea"}).json()["count"]
        == lengths[-1]
    )


def test_streams_of_several_clients_are_the_texts_of_each_alone(client: Any) -> None:
    bodies = [{"prompt": p, "max_tokens": 8 + i, "ignore_eos": True} for i, p in enumerate(PROMPTS)]
    expected = [complete(client, **body).json()["choices"][0]["text"] for body in bodies]
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        events = events_of(complete(client, **bodies[number], stream=True))
        texts[number] = "".join(choice["text"] for event in events for choice in event["choices"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert [texts[number] for number in range(len(bodies))] == expected


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "a " * 100}, "context length"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 40}, "context length"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
        ("/attention", {"text": "a"}, "encoder-decoder"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(client: Any, path: str, body: dict[str, Any], part: str) -> None:
    response = client.post(path, json={"model": "targets", **body})
    assert response.status_code == 400, response.text
    assert part in response.json()["error"]["message"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save_encoder_decoder(tmp_path / "m")
    train_bpe([" ".join(f"w{i}x{i * i}" for i in range(300))] * 2, 500).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"tokenizer: has ids up to .*it is another model's"):
        load_all([tmp_path / "m"], ServeOptions())
