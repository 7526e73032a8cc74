"""Pages of several parts: prompts are read part by part, and what they have in common is shared or copied."""

from __future__ import annotations

import pytest
from engine_cases import Asked, make_engine, make_model, random_ids, run
from small_models import KINDS

from fastattn.models.paged import CHUNK_SIZE


@pytest.mark.parametrize("kind", ["learned", "llama", "gqa, window, qk_norm"])
@pytest.mark.parametrize("page_size", [32, 64])
def test_prompts_are_read_in_parts_of_large_pages(page_size: int, kind: str) -> None:
    model = make_model(**KINDS[kind], n_positions=160)
    common = random_ids(70, 1)
    asked = [
        Asked(
            common + random_ids(n, n), do_sample=False, max_new_tokens=30, **({"scores": 2} if n == 3 else {})
        )
        for n in (3, 20, 1, 12)
    ]
    late = Asked(common + random_ids(5, 9), do_sample=False, max_new_tokens=40)
    engine = make_engine(model, 9 if page_size == 32 else 5, page_size, max_batch=4)
    for each in asked:
        engine.submit(each.request)
    for _ in range(12):
        engine._step()
    run(engine, late)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["shared_tokens"] > 0
    assert engine.batch.decoder.chunk_size == CHUNK_SIZE
    for each in (*asked, late):
        assert each.error is None
        assert [each.tokens()] == each.alone(model, CHUNK_SIZE)


@pytest.mark.parametrize(("page_size", "chunk"), [(1, 1), (8, 8), (16, 16), (24, 24), (32, 16), (48, 16)])
def test_parts_of_prompts_end_where_pages_do(page_size: int, chunk: int) -> None:
    engine = make_engine(make_model(), 200 // page_size, page_size)
    assert engine.batch.decoder.chunk_size == chunk


@pytest.mark.parametrize(("equal", "read"), [(90, 10), (70, 26), (50, 42), (33, 58), (20, 74), (15, 90)])
def test_the_beginning_of_a_page_is_copied_instead_of_read(equal: int, read: int) -> None:
    model = make_model(n_positions=160)
    first = Asked(random_ids(90, 1), do_sample=False, max_new_tokens=12)
    second = Asked(first.prompt[:equal] + random_ids(90 - equal, 2), do_sample=False, max_new_tokens=12)
    engine = make_engine(model, 20, page_size=32)
    run(engine, first)
    run(engine, second)
    assert engine.stats()["prompt_tokens"] == 90 + read
    assert engine.stats()["shared_tokens"] == 90 - read
    again = Asked(first.prompt, do_sample=False, max_new_tokens=12)
    run(engine, again)  # what the second wrote behind its copy is not in the first's page
    for each in (first, second, again):
        assert [each.tokens()] == each.alone(model, CHUNK_SIZE)


@pytest.mark.parametrize("pages", [4, 5, 6])
def test_a_page_to_copy_is_not_the_one_that_is_taken(pages: int) -> None:
    model = make_model(n_positions=128)
    engine = make_engine(model, pages, page_size=32, max_batch=2)
    asked = [
        Asked(random_ids(50, 1)[:n] + random_ids(60 - n, n), max_new_tokens=40) for n in (50, 17, 34, 48)
    ]
    for each in asked:
        run(engine, each)
    run(engine, *(others := [Asked(each.prompt, max_new_tokens=40) for each in asked]))
    for each in (*asked, *others):
        assert [each.tokens()] == each.alone(model, CHUNK_SIZE)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_prompt_that_fills_the_context_takes_all_pages_and_no_more(tokens: int) -> None:
    model = make_model(n_positions=64)
    engine = make_engine(model, 4, page_size=16, max_batch=1)
    asked = Asked(random_ids(64 - tokens, 1), max_new_tokens=tokens, prompt_scores=0)
    after = Asked(random_ids(5, 2), max_new_tokens=4)
    run(engine, asked, after, most=40)
    (news,) = asked.outputs
    assert (news.finish, len(news.tokens), len(news.prompt_scores)) == ("length", tokens, len(asked.prompt))
    assert [after.tokens()] == after.alone(model, 16)
