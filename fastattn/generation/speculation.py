"""Prompt lookup: guess the next tokens from an earlier occurrence of the last ones, and check them in one step.

A guess counts where it is the token that would have been chosen without it, with the same penalties and the same draw,
so that the continuation is that of single steps. Whether guesses pay is measured in the run: how often they would have
been right so far, and how long steps take that check them. Saxena 2023, "Prompt lookup decoding"; Leviathan et al. 2023
for the check.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastattn.generation.choosing import Chooser
from fastattn.generation.drivers import DecoderDriver
from fastattn.generation.rows import Rows, real_tokens
from fastattn.integers import cdiv

LENGTHS = (4, 3, 2, 1)  # of the last tokens that are looked for, the longest first
CHANCES = (
    0.5,
    0.5,
    0.5,
    0.2,
)  # that the token comes next which followed such an occurrence, before any was seen
MEMORY = 24  # matches, or steps with guesses, that the estimates look back on
# The extra cost of a step that checks guesses, as a fraction of a single step, until steps have been timed: a fixed
# part, and one for each guessed token of a row.
COST = {"cpu": (0.2, 0.04), "cuda": (0.05, 0.01)}
LEAST_SINGLE = 2  # single steps that are measured first
LEAST_GAIN = 0.05  # steps that a guess has to be worth
ALLOWANCE = 0.007  # of each step's time, which guesses may lose
START, MOST = 0.7, 4.0  # steps that guesses may lose at first, and at most after they have won some
WORST = 2.0  # steps: what takes longer than that was held up by something else

clock = time.perf_counter  # seconds


class Lookup:
    """Tokens of a sequence, where its last ones stood before, and how often the same token followed as there."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]  # the place after those tokens
        self.place: int | None = None  # after the longest earlier occurrence of the last tokens, the latest
        self.kind = 0  # which of LENGTHS that has
        self.chances = list(CHANCES)  # that the token there comes next
        self.matches = [1] * len(LENGTHS)
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        ids = self.ids
        if self.place is not None:
            kind = self.kind
            self.matches[kind] = count = min(self.matches[kind] + 1, MEMORY)
            self.chances[kind] += ((ids[self.place] == token) - self.chances[kind]) / count
        ids.append(token)
        self.place, end = None, len(ids)
        for kind, length in enumerate(LENGTHS):
            if end >= length:
                places, key = self.places[kind], tuple(ids[-length:])
                if self.place is None:
                    self.place, self.kind = places.get(key), kind
                places[key] = end

    @property
    def chance(self) -> float:
        """The chance that a guess of one token is right; 0 where there is no guess."""
        return 0.0 if self.place is None else self.chances[self.kind]

    def guess(self, count: int) -> list[int]:
        """The tokens that followed the longest earlier occurrence of the last ones, the latest of its length.

        On reaching the end they repeat from the match, as repeated text does.
        """
        if self.place is None or count < 1:
            return []
        following = self.ids[self.place : self.place + count]
        return (following * cdiv(count, len(following)))[:count]


class Costs:
    """What steps that check guesses cost more than single ones, in single steps: assumed first, then measured."""

    def __init__(self, rows: int, device: torch.device) -> None:
        fixed, share = COST.get(device.type, COST["cpu"])
        each = rows * share / (1 + rows * share)  # of one more token in each row
        # (tokens guessed, the cost); the first two stand for none measured
        self.assumed = [(1, fixed + each), (8, fixed + 8 * each)]
        self.checks: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self.widths: set[int] = set()  # that were checked before
        self.fixed, self.each = fixed, each

    def add(self, guessed: int, cost: float) -> None:
        """A step that checked so many tokens in each row cost so much."""
        if guessed in self.widths:
            self.checks.append((guessed, cost))
            self._fit()
        self.widths.add(guessed)  # the first one may have made kernels for its size

    def _fit(self) -> None:
        """A line through the costs by least squares, neither part of it negative."""
        points = [*self.assumed, *self.checks]
        x, y = (sum(values) / len(points) for values in zip(*points))
        slope = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
        self.each = min(max(slope, 0.0), y / x)
        self.fixed = y - self.each * x


# module -> {(rows, how it computes): its costs}, which one generation leaves to the next
_costs: WeakKeyDictionary[Any, dict[tuple[Any, ...], Costs]] = WeakKeyDictionary()


def costs_of(decoder: Any, rows: int, device: torch.device) -> Costs:
    """The costs of a decoder's steps: those that earlier generations of its model measured, where there were any."""
    model = getattr(decoder, "model", None)
    if not isinstance(model, torch.nn.Module):
        return Costs(rows, device)
    kept = _costs.setdefault(model, {})
    key = (rows, device.type, getattr(model, "quantized", None), getattr(decoder, "invariant", None))
    return kept.setdefault(key, Costs(rows, device))


class Account:
    """The balance of steps saved and steps lost by guesses, in single steps, and how many guesses pay.

    Guessing stops while the balance is too low or no gain is expected, except for occasional tries.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.singles: deque[float] = deque(maxlen=MEMORY // 2)  # seconds
        self.balance = START
        self.tries = 0.0  # steps that guesses may cost which are not expected to pay

    def cost(self, guessed: int) -> float:
        """The cost, in single steps, of checking so many more tokens in each row."""
        return self.costs.fixed + guessed * self.costs.each

    def single(self, seconds: float) -> None:
        """A step without guesses took so long."""
        self.singles.append(seconds)
        self._step()

    def checked(self, guessed: int, right: float, seconds: float) -> None:
        """A step checked so many tokens in each row, of which so many were right in the mean of those that go on."""
        cost = min(max(seconds / median(self.singles) - 1, 0.0), WORST)
        self.balance = min(self.balance + right - cost, MOST)
        if right < self.cost(guessed):
            self.tries -= cost
        self.costs.add(guessed, cost)
        self._step()

    def worth(self, chances: Sequence[float], most: int) -> int:
        """How many tokens to guess now in rows whose guesses of one token are right with these chances."""
        if len(self.singles) < LEAST_SINGLE:
            return 0
        best, gain, guessed = 0, -1.0, 1
        while guessed <= most and self.cost(guessed) <= self.balance:
            expected = sum(_right(chance, guessed) for chance in chances) / len(chances) - self.cost(guessed)
            if expected > gain:
                best, gain = guessed, expected
            guessed *= 2  # few different sizes: kernels are made for each
        return best if gain >= LEAST_GAIN or (best and self.cost(best) <= self.tries) else 0

    def _step(self) -> None:
        self.balance = min(self.balance + ALLOWANCE, MOST)
        self.tries = min(self.tries + ALLOWANCE, START)


def _right(chance: float, guessed: int) -> float:
    """How many of the tokens are expected to be right, each with the same chance after the one before."""
    return float(guessed) if chance >= 1 else chance * (1 - chance**guessed) / (1 - chance)


def speculate(
    driver: DecoderDriver, rows: Rows, chooser: Chooser, prompt: Tensor, mask: Tensor | None, most: int
) -> Iterator[None]:
    """Make the rows' tokens, at most `most` guessed ones in a step."""
    prompts = real_tokens(prompt, mask)
    lookups = [Lookup(ids) for ids in prompts]
    held = [len(ids) for ids in prompts]  # tokens in the cache
    account = Account(costs_of(driver.decoder, len(prompts), prompt.device))

    def take(logits: Tensor, going: list[int]) -> Tensor:
        """Choose a token after logits (R, V) for the rows of these numbers; (R,), other entries are undefined."""
        counts = [len(row.ids) for row in rows.rows]
        alike = min(counts) == max(counts)
        tokens = chooser(logits, counts[0] if alike else torch.tensor(counts, device=logits.device))
        accept(tokens.tolist(), going)
        if chooser.scores.changes:
            chooser.scores.add(tokens, torch.tensor(going, device=tokens.device))
        return tokens

    def accept(tokens: list[int], going: list[int]) -> None:
        for row in going:
            rows.rows[row].append(tokens[row])
            lookups[row].add(tokens[row])

    logits = driver.first()
    going = [r for r, row in enumerate(rows.rows) if not row.done]
    tokens: Tensor | None = take(logits, going)  # the last ones; None after guesses
    while True:
        yield
        started = clock()
        ended = [r for r in going if rows.rows[r].done]
        if ended:  # the steps of the others would run past the end of their caches
            going = [r for r in going if not rows.rows[r].done]
            if not going:
                return
            held = [0 if rows.rows[r].done else held[r] for r in range(len(held))]
            driver.rewind(torch.tensor(held, dtype=torch.int32, device=prompt.device))
        guesses: dict[int, list[int]] = {}
        if any(lookups[r].place is not None for r in going):
            worth = account.worth([lookups[r].chance for r in going], most)
            if worth:
                room = {r: rows.rows[r].limit - len(rows.rows[r].ids) - 1 for r in going}
                guesses = {r: lookups[r].guess(worth)[: room[r]] for r in going}
        width = max(map(len, guesses.values()), default=0)
        if not width:
            if tokens is None or len(going) < len(lookups):  # a finished row's entry may be no token
                tokens = torch.tensor([lookup.ids[-1] for lookup in lookups], device=prompt.device)
            tokens = take(driver.next(tokens), going)
            for r in range(len(held)):
                held[r] += 1
            account.single(clock() - started)
            continue
        tokens = None
        fed = [[lookup.ids[-1], *guesses.get(r, ())] for r, lookup in enumerate(lookups)]
        ids = torch.tensor([row + [0] * (1 + width - len(row)) for row in fed], device=prompt.device)
        before = {r: len(lookups[r].ids) for r in going}
        logits = driver.extend(ids)
        right = going
        chosen = chooser.several(logits, [len(row.ids) for row in rows.rows]) if chooser.independent else None
        made = None if chosen is None else chosen.tolist()
        for place in range(1 + width):
            if made is None:
                take(logits[:, place], right)
            else:
                accept([row[place] for row in made], right)
            right = [
                r for r in right
                if place < len(guesses[r]) and lookups[r].ids[-1] == guesses[r][place] and not rows.rows[r].done
            ]  # fmt: skip
            if not right:
                break
        grown = {r: len(lookups[r].ids) - before[r] for r in going}
        # the last token is not in the cache yet
        held = [held[r] + grown[r] if r in grown else 0 for r in range(len(held))]
        driver.rewind(torch.tensor(held, dtype=torch.int32, device=prompt.device))
        account.checked(width, sum(grown.values()) / len(going) - 1, clock() - started)
