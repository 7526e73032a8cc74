"""Prompt lookup changes no token, and its guesses stop where they do not pay; prompts read in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import SIZES, Letters, make, prompts
from torch import Tensor

from fastattn.generation import speculation
from fastattn.generation.speculation import (
    ALLOWANCE,
    LENGTHS,
    MEMORY,
    MOST,
    START,
    WORST,
    Account,
    Costs,
    Lookup,
    costs_of,
)
from fastattn.models import GPT
from fastattn.models.steps import GPTDecoder
from numerics import assert_within_rule

KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary, gqa, window": {"positions": "rotary", "num_kv_heads": 2, "window": 5},
    "alibi": {"positions": "alibi"},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def repetitive(count: int) -> tuple[Tensor, Tensor]:
    """Prompts in which the last tokens stood before, of unequal lengths."""
    ids, mask = prompts(tuple(range(6, 6 + 3 * count, 3)))
    ids[:, -3:] = ids[:, -6:-3]
    return ids, mask


def circling() -> GPT:
    """A model whose next token is a function of the last one alone: it goes in circles, and no guess is wrong."""
    model = make(torch.float64, positions="rotary", tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.h.parameters():
            parameter.zero_()
    return model


class Counts:
    """How often a decoder was stepped and extended, by how many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.guessed = self.extended = 0
        step, extend = GPTDecoder.step, GPTDecoder.extend

        def counted_step(decoder: GPTDecoder, tokens: Tensor) -> Tensor:
            self.steps += 1
            return step(decoder, tokens)

        def counted_extend(decoder: GPTDecoder, tokens: Tensor) -> Tensor:
            self.steps += 1
            self.guessed += tokens.shape[1] - 1
            self.extended += 1
            return extend(decoder, tokens)

        monkeypatch.setattr(GPTDecoder, "step", counted_step)
        monkeypatch.setattr(GPTDecoder, "extend", counted_extend)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"eos_token_id": [7, 9, 11], "pad_token_id": 5},
    {"repetition_penalty": 1.05, "presence_penalty": 0.1},
    {"no_repeat_ngram_size": 8, "min_new_tokens": 20, "eos_token_id": [7, 9, 11], "pad_token_id": 5},
    {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "seed": 3},
    {"do_sample": True, "temperature": 0.5, "seed": [1, 2, 3], "num_return_sequences": 2},
]


@every_kind
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_tokens_are_those_of_single_steps(
    options: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(torch.float64, **options)
    ids, mask = repetitive(3)
    expected = model.generate(ids, mask, max_new_tokens=60, **settings)
    counts = Counts(monkeypatch)
    for most in (1, 3, 16):
        found = model.generate(ids, mask, max_new_tokens=60, prompt_lookup_num_tokens=most, **settings)
        assert torch.equal(found, expected)
    assert counts.guessed


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, "int8"])
def test_invariant_logits_of_guesses_have_the_bits_of_single_steps(
    options: dict[str, Any], dtype: torch.dtype, kind: str | None
) -> None:
    model = make(dtype, **options).quantize(kind)
    ids, mask = repetitive(3)
    lengths, new = mask.sum(1), torch.randint(61, (3, 6))
    one, several = (model.decoder(3, 40, batch_invariant=True) for _ in range(2))
    assert one is not None
    assert several is not None
    for decoder in (one, several):
        decoder.prefill(ids.flip(1), lengths)
    singly = torch.stack([one.step(new[:, i]) for i in range(6)], 1)
    several.extend(new[:, [5, 4]])  # wrong guesses leave nothing behind
    several.rewind(lengths)
    assert torch.equal(several.extend(new), singly)
    plain = model.generate(ids, mask, max_new_tokens=40, batch_invariant=True)
    guessed = model.generate(ids, mask, max_new_tokens=40, batch_invariant=True, prompt_lookup_num_tokens=5)
    assert torch.equal(guessed, plain)


@pytest.mark.parametrize("cost", [(0.1, 0.02), (0.4, 0.1), (1.4, 0.2)], ids=str)
def test_repeated_text_takes_fewer_steps_and_other_text_hardly_more(
    cost: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(monkeypatch)
    fixed, each = cost

    def seconds() -> float:
        return counts.steps + fixed * counts.extended + each * counts.guessed

    monkeypatch.setattr(speculation, "clock", seconds)
    ids, mask = repetitive(1)
    circling().generate(ids[:, :1], max_new_tokens=200, prompt_lookup_num_tokens=8)
    single = SIZES["vocab_size"] + max(LENGTHS)  # until a token stood before, and is found
    some = len(LENGTHS) + 1  # guesses of fewer than 8 tokens, until each length of match was right once
    if fixed < 1:
        assert counts.steps <= single + some + (200 - single) // 9
    assert seconds() <= 200 * (1 + ALLOWANCE) + START + WORST
    counts.steps = counts.guessed = counts.extended = 0
    model = make(torch.float64, positions="rotary", n_positions=700)
    hot = {"do_sample": True, "temperature": 50.0, "seed": 0}
    model.generate(ids, mask, max_new_tokens=600, prompt_lookup_num_tokens=8, **hot)
    assert counts.guessed
    assert seconds() <= 600 * (1 + ALLOWANCE) + START + WORST


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("cost", [(0.1, 0.02), (0.5, 0.1), (1.9, 0.0)], ids=str)
def test_guesses_never_lose_more_than_is_allowed(rows: int, right: int, cost: tuple[float, float]) -> None:
    """However sure of them it is; the last one may cost more than was known before."""
    account = Account(Costs(rows, torch.device("cpu")))
    lost, dearest = 0.0, 0.0
    for step in range(500):
        guessed = account.worth([0.9] * rows, 10)
        if not guessed:
            account.single(2e-3)
            continue
        found, cost_of = min(right, guessed) * (step % 3 == 0), cost[0] + cost[1] * guessed
        account.checked(guessed, found, 2e-3 * (1 + cost_of))
        lost, dearest = lost + min(cost_of, WORST) - found, max(dearest, cost_of)
        assert lost <= START + ALLOWANCE * (step + 1) + dearest + 1e-9
    assert account.balance <= MOST


@pytest.mark.parametrize("cost", [(0.02, 0.01), (0.6, 0.15)], ids=str)
def test_what_guesses_cost_is_measured(cost: tuple[float, float]) -> None:
    account = Account(Costs(1, torch.device("cpu")))
    assert account.worth([1.0], 8) == 0  # before a single step was timed
    for _ in range(3):
        account.single(0.01)
    gap = {n: account.cost(n) - cost[0] - n * cost[1] for n in (1, 8)}
    for guessed in (1, 2, 4, 8) * (MEMORY // 4 + 1):
        account.checked(guessed, 0.0, 0.01 * (1 + cost[0] + cost[1] * guessed))
    for guessed, before in gap.items():
        assert abs(account.cost(guessed) - cost[0] - guessed * cost[1]) <= 0.2 * abs(before)
    account.checked(8, 8.0, 60.0)  # held up
    assert account.costs.checks[-1] == (8, WORST)
    account = Account(Costs(1, torch.device("cpu")))
    for _ in range(9):
        account.single(0.01)
    assert account.worth([0.9], 8) == 8
    assert account.worth([0.5], 8) == 4
    assert account.worth([0.5, 0.0, 0.0], 8) == 0  # three rows wait for the guess of one
    assert account.worth([0.05], 8) == 0
    assert account.worth([0.0], 8) == 0
    for guessed in (1, 8) * 9:
        account.checked(guessed, guessed, 0.01 * (1 + cost[0] + guessed * cost[1]))
    assert account.balance == MOST
    assert bool(account.worth([0.4], 8)) == (cost[0] < 0.4)


def test_a_generation_leaves_its_measured_costs_to_the_next_of_that_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, model, cpu = Counts(monkeypatch), circling(), torch.device("cpu")
    monkeypatch.setattr(speculation, "clock", lambda: counts.steps + 1.2 * counts.extended)

    def of_eight(rows: int = 1, **options: Any) -> float:
        costs = costs_of(model.decoder(rows, 8, **options), rows, cpu)
        return costs.fixed + 8 * costs.each

    assumed = {rows: Costs(rows, cpu).fixed + 8 * Costs(rows, cpu).each for rows in (1, 2)}
    assert of_eight() == assumed[1]
    for _ in range(3):
        model.generate(torch.tensor([[5, 6] * 9]), max_new_tokens=150, prompt_lookup_num_tokens=8)
    measured = of_eight()
    assert assumed[1] < measured <= 1.2
    assert of_eight(2) == assumed[2]
    assert of_eight(batch_invariant=True) == assumed[1]
    assert costs_of(object(), 1, cpu).fixed == Costs(1, cpu).fixed
    model.quantize("int8")
    assert of_eight() == assumed[1]
    model.quantize(None)
    assert of_eight() == measured


def test_one_token_is_enough_to_find_a_place_by() -> None:
    lookup = Lookup([7, 8, 1, 7])
    assert (lookup.guess(2), lookup.kind) == ([8, 1], LENGTHS.index(1))
    assert lookup.chance < Lookup([6, 7, 8, 1, 6, 7]).chance


def test_a_guess_is_as_likely_as_those_before_were_right() -> None:
    sure, unsure = (
        Lookup([1, 2, 3, 4, 5] * 20),
        Lookup([n for i in range(50) for n in (1, 2, 10 + i)] + [1, 2]),
    )
    assert sure.chance > 1 - 1 / MEMORY
    assert unsure.chance < 2 / MEMORY
    assert Lookup([1, 2, 3]).chance == 0


def test_a_guess_is_what_followed_the_longest_latest_occurrence_and_goes_on_in_circles() -> None:
    def guess(text: str, count: int) -> str:
        return "".join(map(chr, Lookup(list(map(ord, text))).guess(count)))

    assert guess("the cat and the", 4) == " cat"
    assert guess("xab1 yab2 ab", 2) == "2 "  # the latest
    assert guess("xab1 yab2 xab", 2) == "1 "  # the longest
    assert guess("abcabc", 8) == "abcabcab"
    assert guess("zzz", 5) == "zzzzz"
    assert guess("abcdef", 3) == ""
    assert guess("", 3) == guess("a", 3) == guess("abab", 0) == ""


def test_guesses_go_up_to_the_last_position() -> None:
    model = make(torch.float64)  # 96 learned positions
    ids, mask = repetitive(2)
    room = 96 - ids.shape[1] + 1
    expected = model.generate(ids, mask, max_new_tokens=room)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=room, prompt_lookup_num_tokens=20), expected)


def test_a_stop_string_within_right_guesses_ends_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = circling()
    ids = model.generate(
        torch.tensor([[5], [40]]), max_new_tokens=SIZES["vocab_size"] + 2
    )  # circles are closed
    text = Letters().decode(model.generate(ids, max_new_tokens=8)[0, -8:].tolist())
    options: dict[str, Any] = {"stop_strings": text[5:8], "tokenizer": Letters(), "pad_token_id": 1}
    expected = model.generate(ids, max_new_tokens=60, **options)
    counts = Counts(monkeypatch)
    found = model.generate(ids, max_new_tokens=60, prompt_lookup_num_tokens=9, **options)
    assert torch.equal(found, expected)
    assert counts.guessed


def test_a_model_without_a_decoder_is_refused() -> None:
    model = make()
    model.ln_f.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"^prompt_lookup_num_tokens: this model has no decoder"):
        model.generate(prompts((3,))[0], prompt_lookup_num_tokens=3)


@every_kind
@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_prompts_in_chunks_give_the_same_tokens(options: dict[str, Any], size: int) -> None:
    model = make(torch.float64, **options)
    ids, mask = prompts((9, 4, 1, 7))
    expected = model.generate(ids, mask, max_new_tokens=12)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=12, prefill_chunk_size=size), expected)
    model.ln_f.register_forward_hook(lambda *args: None)  # by the model's step instead of a decoder
    assert torch.equal(model.generate(ids, mask, max_new_tokens=12, prefill_chunk_size=size), expected)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_behind_chunks_are_within_the_error_rule(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = make(dtype, **options)
    ids, mask = prompts((40, 33, 1), "right")
    lengths = mask.sum(1)
    golden = _last_logits(make(torch.float64, **options).eval(), model, ids, lengths)
    plain = torch.stack([_plain(model, ids[r : r + 1, :n]) for r, n in enumerate(lengths.tolist())])
    for chunk_size in (None, 7):
        for invariant in (False, True):
            decoder = GPTDecoder(model, 3, 41, batch_invariant=invariant)
            found = decoder.prefill(ids, lengths, chunk_size=chunk_size)
            assert_within_rule(found.double(), plain.double(), golden, dtype=dtype)


def _last_logits(wide: GPT, model: GPT, ids: Tensor, lengths: Tensor) -> Tensor:
    """float64 logits of the model's own, rounded weights."""
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return torch.stack([_plain(wide, ids[r : r + 1, :n]) for r, n in enumerate(lengths.tolist())])


@torch.no_grad()
def _plain(model: GPT, ids: Tensor) -> Tensor:
    """Logits after the last token, (V,), by a model in the same dtype that reads one prompt at once."""
    logits = model(ids).logits
    assert logits is not None
    return logits[0, -1]


def test_chunks_bound_what_is_allocated() -> None:
    from allocations import Allocations

    model = make(positions="rotary", n_positions=600)
    ids = prompts((512,))[0]
    most = []
    for size in (None, 32):
        decoder = GPTDecoder(model, 1, 520)
        with Allocations() as allocated:
            decoder.prefill(ids, chunk_size=size)
        most.append(max(allocated.sizes))
    assert most[1] < most[0] / 4


def test_an_invariant_prompt_in_chunks_has_the_bits_that_it_has_alone() -> None:
    model = make(torch.bfloat16, positions="rotary")
    ids, mask = prompts((30, 11, 4), "right")
    together = GPTDecoder(model, 3, 40, batch_invariant=True).prefill(ids, mask.sum(1), chunk_size=6)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = GPTDecoder(model, 1, 60, batch_invariant=True).prefill(
            ids[row : row + 1, :length], chunk_size=6
        )
        assert torch.equal(alone[0], together[row])
