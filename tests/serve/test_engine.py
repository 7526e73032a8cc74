"""The engine on its own: what runs beside a request changes nothing of it, and what fails or leaves frees its pages."""

from __future__ import annotations

import time

import pytest
import torch
from engine_cases import PAGE, Asked, finish, make_engine, make_model, random_ids, run
from small_models import KINDS, VOCAB

from fastattn.models import GPT
from fastattn.models.paged import LARGE_BLOCKS
from fastattn.serve.engine import Engine, Output
from fastattn.serve.engine.requests import DeadlineError, FrequencyPenalty, LogitBias, Overloaded, scores_of
from numerics import assert_within_rule


def mixed() -> list[Asked]:
    common = random_ids(20, 1)
    return [
        Asked(common + random_ids(3, 2), scores=2, do_sample=False, max_new_tokens=20),
        Asked(
            common + random_ids(9, 3), do_sample=True, seed=5, temperature=0.8, top_p=0.9, max_new_tokens=17
        ),
        Asked(random_ids(5, 4), do_sample=True, seed=7, top_k=5, max_new_tokens=12, repetition_penalty=1.3),
        Asked(common[:17] + random_ids(1, 5), scores=2, presence_penalty=0.5, max_new_tokens=25),
        Asked(random_ids(30, 6), do_sample=False, max_new_tokens=10, no_repeat_ngram_size=2),
        Asked(common, do_sample=True, seed=11, max_new_tokens=9),
    ]


@pytest.mark.parametrize("kind", ["learned", "llama", "gemma", "alibi", "gqa, window, qk_norm"])
def test_tokens_are_those_of_generate_alone_whatever_else_runs(kind: str) -> None:
    model = make_model(**KINDS[kind])
    asked = mixed()
    engine = make_engine(model, pages=9, max_batch=4)  # too few for all: some lose their pages in between
    run(engine, *asked)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["shared_tokens"] > 0
    for each in asked:
        assert each.error is None
        assert [each.tokens()] == each.alone(model), each.options


@pytest.mark.parametrize("page_size", [8, 16])
def test_padding_tokens_in_prompts_count_alike_whatever_else_runs(page_size: int) -> None:
    """Positions of RoBERTa's kind do not count them, in whatever parts and company a prompt is read."""
    model = make_model(position_offset=2, pad_token_id=1)
    common = [*random_ids(3, 1), 1, *random_ids(16, 2), 1, *random_ids(10, 3)]
    prompts = [common + random_ids(4, 4), [1, *random_ids(9, 5), 1], common + random_ids(7, 6)]
    asked = [Asked(prompt, do_sample=False, max_new_tokens=15) for prompt in prompts]
    engine = make_engine(model, pages=96 // page_size, page_size=page_size, max_batch=3)
    run(engine, *asked)
    run(engine, again := Asked(prompts[0], do_sample=False, max_new_tokens=15))
    assert engine.stats()["preemptions"] > 0
    assert engine.stats()["shared_tokens"] > 0
    for each in (*asked, again):
        assert [each.tokens()] == each.alone(model, page_size) == each.alone(model, 64)


def test_tokens_of_16_bit_models_do_not_depend_on_company_either() -> None:
    model = make_model().bfloat16()
    asked = mixed()
    run(make_engine(model, pages=9, max_batch=4), *asked)
    for each in asked:
        assert [each.tokens()] == each.alone(model), each.options


def test_without_invariance_likeliest_tokens_that_stand_out_are_the_same() -> None:
    model = make_model()
    asked = [each for each in mixed() if not each.options.get("do_sample")]
    engine = make_engine(model, pages=9, max_batch=4, batch_invariant=False)
    run(engine, *asked)
    assert engine.stats()["preemptions"] > 0
    for each in asked:
        assert [each.tokens()] == each.alone(model), each.options


def test_log_probabilities_have_the_same_bits_alone_and_in_company() -> None:
    model = make_model()
    together, alone = mixed(), mixed()
    run(make_engine(model, pages=9, max_batch=4), *together)
    for each in alone:
        run(make_engine(model, pages=40), each)
    scored = [[s for out in each.outputs for s in out.scores] for each in together]
    assert scored == [[s for out in each.outputs for s in out.scores] for each in alone]
    assert [len(scores) for scores in scored] == [20, 0, 0, 25, 0, 0]


def answering(model: GPT) -> tuple[Engine, Asked]:
    """An engine that has answered a few tokens of a request."""
    first = Asked(random_ids(4, 1), max_new_tokens=30)
    engine = make_engine(model, pages=80)
    engine.submit(first.request)
    for _ in range(3):
        engine._step()
    return engine, first


def test_short_prompts_that_come_together_are_read_in_one_step() -> None:
    model = make_model()
    engine, _ = answering(model)
    short = [Asked(random_ids(PAGE + 1 + i, 2 + i), max_new_tokens=3) for i in range(4)]
    for each in short:
        engine.submit(each.request)
    engine._step()
    assert [len(each.tokens()) for each in short] == [1] * 4
    finish(engine)
    for each in short:
        assert [each.tokens()] == each.alone(model)


def test_prompts_read_in_chunks_run_beside_decodes() -> None:
    model = make_model()
    engine, first = answering(model)
    long = Asked(random_ids(40, 2), max_new_tokens=3)
    engine.submit(long.request)
    before = len(first.tokens())
    while not long.outputs:
        engine._step()
    assert len(first.tokens()) - before >= 40 // PAGE  # a token with each chunk
    finish(engine)


def test_continuations_of_a_prompt_share_its_pages_until_they_write() -> None:
    model = make_model()
    asked = Asked(random_ids(20, 1), copies=3, do_sample=True, seed=3, max_new_tokens=9)
    engine = make_engine(model, pages=40)
    engine.submit(asked.request)
    while not asked.outputs:
        engine._step()
    assert (
        engine.stats()["pages_held"] <= 3 + 3
    )  # 20 tokens are three pages, of which each may have copied one
    assert engine.stats()["prompt_tokens"] == 20
    finish(engine)
    assert [asked.tokens(i) for i in range(3)] == asked.alone(model, num_return_sequences=3)
    tight = Asked(asked.prompt, copies=3, **asked.options)
    engine = make_engine(model, pages=8, max_batch=2)
    run(engine, tight)
    assert [tight.tokens(i) for i in range(3)] == asked.alone(model, num_return_sequences=3)


def test_a_prompt_seen_before_is_not_read_again() -> None:
    model = make_model()
    engine = make_engine(model, pages=20)
    first, second = (Asked(random_ids(24, 1), max_new_tokens=4) for _ in range(2))
    run(engine, first)
    assert engine.stats()["prompt_tokens"] == 24
    run(engine, second)
    assert engine.stats()["prompt_tokens"] == 24 + PAGE  # its last page, for the logits behind it
    assert first.tokens() == second.tokens()


@pytest.mark.parametrize("kind", ["dynamic"])
def test_pages_are_not_shared_where_keys_depend_on_the_prompts_length(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 2.0}
    model = make_model(positions="rotary", rope_scaling=scaling, n_positions=16)
    model.config.n_positions = 64
    engine = make_engine(model, pages=20)
    asked = [Asked(random_ids(12, 1) + random_ids(n, 2), max_new_tokens=6) for n in (3, 20)]
    run(engine, *asked)
    assert engine.stats()["shared_tokens"] == 0
    for each in asked:
        assert [each.tokens()] == each.alone(model)


def test_prompt_scores_are_those_of_the_forward_pass() -> None:
    model = make_model()
    asked = Asked(random_ids(21, 1), prompt_scores=3, max_new_tokens=0)
    engine = make_engine(model, pages=20)
    run(engine, asked)
    (out,) = asked.outputs
    assert (out.finish, out.tokens) == ("length", [])
    assert [s.token for s in out.prompt_scores] == asked.prompt
    assert out.prompt_scores[0].logprob is None
    ids, following = torch.tensor([asked.prompt]), torch.tensor(asked.prompt[1:])[:, None]
    with torch.no_grad():
        plain = model(ids).logits[0, :-1].log_softmax(-1)
        golden = model.double()(ids).logits[0, :-1].log_softmax(-1)
    scores = out.prompt_scores[1:]
    found = torch.tensor([[s.logprob, *(logprob for _, logprob in s.top)] for s in scores])
    assert [[token for token, _ in s.top] for s in scores] == golden.topk(3).indices.tolist()
    wanted = [torch.cat((x.gather(1, following), x.topk(3).values), 1) for x in (plain, golden)]
    assert_within_rule(found, *wanted)


def test_prompt_scores_come_once_also_after_a_preemption() -> None:
    model = make_model()
    engine = make_engine(model, pages=20)
    first = Asked(random_ids(4, 2), max_new_tokens=12)
    asked = Asked(random_ids(30, 1), prompt_scores=1, max_new_tokens=2)
    engine.submit(first.request)
    engine.submit(asked.request)
    for _ in range(3):
        engine._step()
    engine.batch._preempt(engine.batch.running[-1])
    finish(engine)
    assert [s.token for out in asked.outputs for s in out.prompt_scores] == asked.prompt
    assert [asked.tokens()] == asked.alone(model)


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_cancelling_frees_the_pages_within_a_step(when: str) -> None:
    model = make_model()
    engine = make_engine(model, pages=20, max_batch=1 if when == "waiting" else 4)
    other, asked = Asked(random_ids(3, 1), max_new_tokens=30), Asked(random_ids(40, 2), max_new_tokens=20)
    engine.submit(other.request)
    engine._step()
    engine.submit(asked.request)
    for _ in range(12 if when == "decoding" else 2):
        engine._step()
    assert bool(asked.outputs) == (when == "decoding")
    asked.request.cancel()
    engine._step()
    assert {each.request for each in (*engine.batch.running, *engine.batch.waiting)} == {other.request}
    assert engine.stats()["pages_held"] == sum(len(each.pages) for each in engine.batch.running)
    finish(engine)
    assert [other.tokens()] == other.alone(model)


def test_a_request_that_fails_fails_alone() -> None:
    model = make_model()

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * float("nan") if ids.shape[1] > 8 else scores

    good, bad = mixed(), Asked(random_ids(4, 9), logits_processor=broken, max_new_tokens=20)
    run(make_engine(model, pages=9, max_batch=4), bad, *good)
    assert "not finite" in str(bad.error)
    for each in good:
        assert [each.tokens()] == each.alone(model)


def test_a_listener_that_fails_is_a_listener_that_left() -> None:
    model = make_model()
    engine = make_engine(model, pages=20)
    good, bad = Asked(random_ids(5, 1), max_new_tokens=6), Asked(random_ids(5, 2), max_new_tokens=30)

    def gone(output: Output) -> None:
        raise ConnectionError

    bad.request.on_output = gone
    run(engine, bad, good, most=12)
    assert [good.tokens()] == good.alone(model)


def test_a_deadline_ends_a_request() -> None:
    engine = make_engine(make_model(), pages=20)
    late = Asked(random_ids(5, 1), max_new_tokens=6, deadline=time.monotonic() - 1.0)
    run(engine, late)
    assert isinstance(late.error, DeadlineError)


def test_a_full_batch_has_the_bits_of_each_request_alone() -> None:
    model = make_model(n_embd=64)
    asked = [Asked(random_ids(3 + i, i), scores=1, max_new_tokens=6) for i in range(LARGE_BLOCKS[0] + 2)]
    engine = make_engine(model, pages=200, max_batch=LARGE_BLOCKS[0] + 2)
    run(engine, *asked)
    alone = [Asked(each.prompt, scores=1, max_new_tokens=6) for each in asked]
    for each in alone:
        run(engine, each)
    for ours, theirs in zip(asked, alone):
        assert [ours.tokens()] == ours.alone(model)
        together, single = ([s for out in each.outputs for s in out.scores] for each in (ours, theirs))
        assert together == single


def test_scores_of_tokens_that_a_model_rules_out_are_numbers_of_json() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 0.0]])
    (score,) = scores_of(logits, [1], 3)
    assert (score.logprob, score.top[-1]) == (-9999.0, (1, -9999.0))


def test_penalties_and_biases() -> None:
    ids, scores = torch.tensor([[4, 4, 1, 1, 2]]), torch.zeros(1, 6)
    assert FrequencyPenalty(2, 0.5)(ids, scores).tolist() == [[0.0, -1.0, -0.5, 0.0, 0.0, 0.0]]
    assert LogitBias({3: -2.0})(ids, scores).tolist() == [[0.0, 0.0, 0.0, -2.0, 0.0, 0.0]]


def test_what_does_not_fit_is_refused_before_it_waits() -> None:
    engine = make_engine(make_model(), pages=8, max_queue=2)
    for prompt, options, named in (
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([1] * 60, {"max_new_tokens": 5}, "max_tokens"),
        ([1], {"temperature": 0.5, "do_sample": False}, "temperature"),
        ([1], {"num_beams": 2}, "num_beams"),
    ):
        with pytest.raises(ValueError, match=named):
            engine.submit(Asked(prompt, **options).request)
    with pytest.raises(ValueError, match="n: got 2"):
        engine.submit(Asked([1], copies=2, do_sample=False).request)
    for _ in range(2):
        engine.submit(Asked([1]).request)
    with pytest.raises(Overloaded):
        engine.submit(Asked([1]).request)
    with pytest.raises(ValueError, match="kv_memory"):
        make_engine(make_model(), pages=7)


def test_the_thread_answers_and_drains() -> None:
    model = make_model()
    engine = make_engine(model, pages=20)
    engine.start()
    asked = [Asked(random_ids(6, i), max_new_tokens=8) for i in range(3)]
    for each in asked:
        engine.submit(each.request)
    assert engine.drain(30.0)
    with pytest.raises(Overloaded):
        engine.submit(Asked([1]).request)
    engine.stop()
    assert not engine.alive
    for each in asked:
        assert [each.tokens()] == each.alone(model)


def test_stopping_fails_what_is_not_finished() -> None:
    engine = make_engine(make_model(), pages=20)
    asked = Asked(random_ids(6, 1), max_new_tokens=50)
    engine.submit(asked.request)
    engine._step()
    engine._stopped = True
    engine._work()
    assert isinstance(asked.error, Overloaded)
    assert engine.stats()["pages_held"] == 0
