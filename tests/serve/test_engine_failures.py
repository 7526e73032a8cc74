"""Errors within the engine end the request that they are of, free its pages, and leave all others as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import Asked, make_engine, make_model, random_ids, run

from fastattn.serve.engine.requests import Overloaded


def test_out_of_memory_makes_the_latest_request_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    engine = make_engine(model, pages=40)
    compute, calls = engine.batch.decoder.run, []

    def scarce(parts: Any, tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return compute(parts, tokens, *others)

    monkeypatch.setattr(engine.batch.decoder, "run", scarce)
    asked = [Asked(random_ids(5, i), max_new_tokens=6) for i in range(3)]
    run(engine, *asked)
    assert max(calls) == 3
    for each in asked:
        assert [each.tokens()] == each.alone(model)


def test_out_of_memory_alone_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_model(), pages=20)

    def none(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine.batch.decoder, "run", none)
    asked = Asked(random_ids(5, 1), max_new_tokens=6)
    run(engine, asked)
    assert isinstance(asked.error, torch.OutOfMemoryError)


@pytest.mark.parametrize("where", ["a shared part", "a page of the prompt's continuations"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("broken")])
def test_an_error_of_a_copied_page_ends_at_most_its_request(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    engine = make_engine(model, pages=9, page_size=32, max_batch=4)
    common = random_ids(20, 1)
    first, other = (
        Asked(common + random_ids(3, 2), max_new_tokens=3),
        Asked(random_ids(5, 3), max_new_tokens=9),
    )
    shared = where == "a shared part"
    prompt, copies = (common if shared else []) + random_ids(5, 9), 1 if shared else 2
    asked = Asked(prompt, copies=copies, do_sample=True, seed=1, max_new_tokens=3)
    run(engine, first)

    def none(*_: object) -> None:
        raise error

    monkeypatch.setattr(engine.batch.decoder, "copy_page", none)
    engine.submit(other.request)
    engine._step()
    run(engine, asked)  # which sees that no page is held afterwards
    assert [other.tokens()] == other.alone(model, 16)
    if isinstance(error, torch.OutOfMemoryError):  # the part is read, or a continuation waits
        assert [asked.tokens(i) for i in range(copies)] == asked.alone(model, 16, num_return_sequences=copies)
    else:
        assert asked.error is error


def test_a_continuation_that_fails_takes_its_siblings_along_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, calls = make_engine(make_model(), pages=9, max_batch=4), []

    def breaks(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape[1])
        if len(calls) == 4:
            raise RuntimeError("broken")
        return scores

    asked = Asked(
        random_ids(5, 1), copies=3, do_sample=True, seed=1, logits_processor=breaks, max_new_tokens=2
    )
    run(engine, asked)
    assert calls == [5, 5, 5, 6]
    assert [out.finish for out in asked.outputs] == [None] * 4
    assert len(caplog.records) == 1


def test_choosers_exist_only_while_continuations_run() -> None:
    engine = make_engine(make_model(), pages=20, max_batch=2, max_queue=2)
    asked = [Asked(random_ids(5, i), copies=2, seed=i, do_sample=True, max_new_tokens=4) for i in range(3)]
    for each in asked:
        each.request.options = replace(each.request.options, presence_penalty=0.5, repetition_penalty=1.2)
    engine.submit(*(each.request for each in asked))
    late = Asked([10**6])
    with pytest.raises(Overloaded):  # before the prompt is looked at
        engine.submit(late.request)
    assert late.request.sequences == []
    most = 0
    while engine.busy:
        engine._step()
        held = [each for one in asked for each in one.request.sequences if "chooser" in vars(each)]
        most = max(most, len(held))
        assert all(each.made and not each.row.done for each in held)
    assert most == 2
    for each in asked:
        expected = each.alone(
            engine.model, num_return_sequences=2, presence_penalty=0.5, repetition_penalty=1.2
        )
        assert [each.tokens(0), each.tokens(1)] == expected


def test_an_error_of_a_pass_ends_the_request_that_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    engine = make_engine(model, pages=40)
    compute = engine.batch.decoder.run
    bad = Asked([7, 7, 7], max_new_tokens=6)
    good = [Asked(random_ids(5 + 9 * i, i), max_new_tokens=6) for i in range(3)]

    def breaks(parts: Any, tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if any(part.ids.tolist() == bad.prompt for part in parts):
            raise RuntimeError("broken")
        return compute(parts, tokens, *others)

    monkeypatch.setattr(engine.batch.decoder, "run", breaks)
    engine.submit(good[0].request)
    engine._step()  # it decodes while the others are read
    run(engine, bad, *good[1:])
    assert str(bad.error) == "broken"
    for each in good:
        assert [each.tokens()] == each.alone(model)
