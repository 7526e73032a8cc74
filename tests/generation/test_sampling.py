"""What logits go through, beside transformers' processors; draws by their frequencies and by what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_cases import SIZES, make, prompts
from torch import Tensor

from fastattn.generation import generate
from fastattn.generation.sampling import NUCLEUS, Draws, Penalties, draw, shares
from numerics import share_bound

NONE: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1e-4},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.6},
    {"top_p": 0.97},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.999, "min_p": 1e-4},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [61, 4 * NUCLEUS])
def test_the_distribution_is_that_of_transformers(options: dict[str, Any], vocab_size: int) -> None:
    pytest.importorskip("transformers")
    from transformers.generation import logits_process as theirs

    logits = 3 * torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(0))
    made = {
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    expected = logits
    for name, kind in made.items():  # in their order
        if name in options:
            expected = kind(options[name])(None, expected)
    found = shares(logits, **{**NONE, **options})
    assert torch.equal(found > 0, expected.softmax(-1) > 0)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_as_likely_as_the_last_one_kept_stay(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, -5.0]], dtype=dtype)
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        assert (shares(logits, **{**NONE, **options}) > 0).tolist() == [[True] * 4 + [False]]


@pytest.mark.parametrize("penalty", [1.3, 0.6])
@pytest.mark.parametrize("padded", [False, True])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float, padded: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids, mask = prompts((9, 4, 1) if padded else (9, 9, 9))
    ours = Penalties(ids, mask.bool() if padded else None, 61, penalty, 0.0)
    theirs = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=mask.argmax(1))
    for step in range(5):
        logits = torch.randn(3, 61, generator=torch.Generator().manual_seed(step))
        assert torch.equal(ours(logits), theirs(ids, logits))
        tokens = torch.tensor([step, 60, 3])
        ours.add(tokens)
        ids = torch.cat((ids, tokens[:, None]), 1)


def test_the_presence_penalty_counts_tokens_of_the_continuation_once() -> None:
    ids, _ = prompts((9, 9))
    ours, logits = Penalties(ids, None, 61, 1.0, 0.75), torch.randn(2, 61)
    assert torch.equal(ours(logits), logits)
    for tokens in ([5, 6], [5, 7], [8, 8]):
        ours.add(torch.tensor(tokens))
    ours.add(torch.tensor([9, 10]), torch.tensor([1]))  # the second row only
    expected = logits.clone()
    expected[0, [5, 8]] -= 0.75
    expected[1, [6, 7, 8, 10]] -= 0.75
    assert torch.equal(ours(logits), expected)
    ours.reorder(torch.tensor([1, 1]))
    assert torch.equal(ours(logits)[1], expected[1])


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"presence_penalty": 3.0}], ids=str)
@pytest.mark.parametrize("do_sample", [False, True])
def test_penalties_change_what_is_chosen_and_a_row_as_alone(options: dict[str, Any], do_sample: bool) -> None:
    model = make(torch.float64)
    ids, mask = prompts((8, 3, 5))
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": do_sample}
    if do_sample:
        settings["temperature"] = 0.1
    out = model.generate(ids, mask, **settings, **options, seed=[1, 2, 3])
    plain = model.generate(ids, mask, **settings, seed=[1, 2, 3])
    assert not torch.equal(out, plain)
    assert len(set(out[:, 8:].flatten().tolist())) > len(set(plain[:, 8:].flatten().tolist()))
    for row in range(3):
        alone = model.generate(ids[row][mask[row].bool()][None], **settings, **options, seed=row + 1)
        assert torch.equal(alone[0, -20:], out[row, -20:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_with_penalty_and_processor_is_transformers(use_cache: bool) -> None:
    pytest.importorskip("transformers")
    from generation_cases import theirs_and_ours
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

    theirs, ours = theirs_and_ours(eos_token_id=7, pad_token_id=5)
    ids, mask = prompts((9, 4, 7))
    processor = NoRepeatNGramLogitsProcessor(2)
    options: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 1.2, "do_sample": False}
    expected = theirs.generate(
        ids, attention_mask=mask, logits_processor=LogitsProcessorList([processor]), **options
    )
    found = ours.generate(ids, mask, logits_processor=[processor], use_cache=use_cache, **options)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"^logits_processor: returned \(3, 60\), needs scores of shape"):
        ours.generate(ids, mask, logits_processor=lambda ids, scores: scores[:, 1:])


DRAWS = 40_000


def frequencies(logits: Tensor, **options: Any) -> Tensor:
    probs = shares(logits.expand(DRAWS, -1), **{**NONE, **options})
    draws = Draws([(0, row) for row in range(DRAWS // 250)], torch.device("cpu"))
    drawn = draw(probs, torch.cat([draws.at(t) for t in range(250)]))
    return torch.bincount(drawn, minlength=logits.shape[-1]) / DRAWS


def test_sampled_frequencies() -> None:
    probs = torch.tensor([0.05, 0.4, 0.3, 0.25])
    logits = probs.log()[None]
    for options, expected in [
        ({}, probs),
        ({"temperature": 2.0}, probs.sqrt() / probs.sqrt().sum()),
        ({"top_k": 2}, torch.tensor([0, 0.4, 0.3, 0]) / 0.7),
        ({"top_p": 0.5}, torch.tensor([0, 0.4, 0.3, 0]) / 0.7),  # 0.4 does not reach 0.5 yet
        ({"top_p": 0.75}, torch.tensor([0, 0.4, 0.3, 0.25]) / 0.95),
        ({"top_p": 1.0, "top_k": 9}, probs),
        ({"top_k": 3, "top_p": 0.6}, torch.tensor([0, 0.4, 0.3, 0]) / 0.7),
        ({"min_p": 0.7}, torch.tensor([0, 0.4, 0.3, 0]) / 0.7),
    ]:
        for share, p in zip(frequencies(logits, **options).tolist(), expected.tolist()):
            assert abs(share - p) <= share_bound(p, DRAWS)


# The upper 1e-6 quantile of chi-square with so many degrees of freedom.
CHI_SQUARE_MOST = {60: 126.8, 63: 131.1}


def test_draws_of_a_model_fit_its_distribution_by_chi_square() -> None:
    model = make()
    ids, _ = prompts((5,))
    with torch.no_grad():
        expected = model(ids).logits[0, -1].div(4.0).softmax(-1)
    drawn = generate(
        model,
        ids,
        max_new_tokens=1,
        do_sample=True,
        temperature=4.0,
        seed=0,
        num_return_sequences=8000,
    )
    counts = torch.bincount(drawn[:, -1], minlength=61).double()
    assert expected.min() * 8000 > 1
    statistic = ((counts - 8000 * expected) ** 2 / (8000 * expected)).sum()
    assert statistic < CHI_SQUARE_MOST[60]


def test_uniform_numbers_are_uniform_and_of_their_own_in_every_place() -> None:
    draws = Draws([(seed, index) for seed in (0, 1, 2**63) for index in range(40)], torch.device("cpu"))
    numbers = torch.cat([draws.at(t) for t in range(300)], 1)
    assert numbers.unique().numel() == numbers.numel()
    assert bool((numbers >= 0).all() & (numbers < 1).all())
    for values in (numbers, numbers * 64 % 1, numbers[:, 1:] - numbers[:, :-1] + 1):
        counts = torch.bincount((values % 1 * 64).long().flatten(), minlength=64).double()
        share = counts.sum() / 64
        assert ((counts - share) ** 2 / share).sum() < CHI_SQUARE_MOST[63]
    later = Draws([(1, 3)], torch.device("cpu"))
    assert torch.equal(later.at(torch.tensor([299])), numbers[43:44, 299:300])


def test_a_draw_at_either_end_is_a_token_that_may_be_drawn() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    edges = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert draw(probs.expand(3, -1), edges).tolist() == [1, 3, 3]


def test_a_seed_gives_a_row_its_draws_whatever_else_is_in_the_batch() -> None:
    model = make(torch.float64)
    ids, mask = prompts((8, 3, 5))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    out = model.generate(ids, mask, seed=4, **options)
    assert torch.equal(model.generate(ids[:2], mask[:2], seed=4, **options), out[:2])
    assert torch.equal(model.generate(ids, mask, seed=4, use_cache=False, **options), out)
    same = ids[:1].expand(3, -1)
    assert len({tuple(row) for row in model.generate(same, seed=4, **options).tolist()}) == 3
    seeds = [11, 22, 11]
    several = model.generate(ids, mask, seed=seeds, num_return_sequences=2, **options)
    for row in range(3):
        prompt = ids[row][mask[row].bool()][None]
        alone = model.generate(prompt, seed=seeds[row], num_return_sequences=2, **options)
        assert torch.equal(alone[:, -12:], several[2 * row : 2 * row + 2, -12:])
    assert torch.equal(
        model.generate(same, seed=[7, 7, 7], **options), model.generate(same, seed=[7] * 3, **options)
    )
    assert len({tuple(row) for row in model.generate(same, seed=[7] * 3, **options).tolist()}) == 1


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}], ids=str)
def test_invariant_samples_have_the_tokens_of_a_sequence_alone(options: dict[str, Any]) -> None:
    model = make(torch.bfloat16)
    ids, mask = prompts((8, 3, 5, 1, 6))
    settings = {
        "max_new_tokens": 12,
        "do_sample": True,
        "temperature": 2.0,
        "batch_invariant": True,
        **options,
    }
    out = model.generate(ids, mask, seed=list(range(5)), **settings)
    for row in range(5):
        alone = model.generate(ids[row : row + 1], mask[row : row + 1], seed=row, **settings)
        assert torch.equal(alone[0], out[row])


def test_a_prompt_is_read_once_for_several_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.models.steps import GPTDecoder

    read: list[int] = []
    prefill: Callable[..., Tensor] = GPTDecoder.prefill
    monkeypatch.setattr(
        GPTDecoder, "prefill", lambda self, ids, *a, **k: read.append(len(ids)) or prefill(self, ids, *a, **k)
    )
    model = make(torch.float64)
    ids, mask = prompts((8, 3))
    out = model.generate(ids, mask, do_sample=True, num_return_sequences=3, seed=1, max_new_tokens=6)
    assert read == [2]
    assert out.shape == (6, 14)
    repeated = model.generate(
        ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), do_sample=True, seed=1, max_new_tokens=6
    )
    assert torch.equal(out, repeated)
    assert SIZES["vocab_size"] > int(out.max())
