"""Prompt lookup: guess the next tokens from an earlier occurrence of the last ones, and check them in one step.

A guess counts where it is the token that would have been chosen without it, with the same penalties and the same draw,
so that the continuation is that of single steps. Saxena 2023, "Prompt lookup decoding"; Leviathan et al. 2023 for the
check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.generation.choosing import Chooser, greedy
from fastattn.generation.drivers import DecoderDriver
from fastattn.generation.rows import Rows, real_tokens

LENGTHS = (4, 3, 2)  # of the last tokens that are looked for, the longest first
# The extra cost of a step that checks guesses, as a fraction of a single step: a fixed part, and one for each guessed
# token of a row. Measured on a CPU with GPT-2 small in float32 and int8; on a GPU an assumption.
COST = {"cpu": (0.3, 0.04), "cuda": (0.05, 0.01)}
ALLOWANCE = 0.01  # the fraction of each step's time that guesses may lose
START, MOST = 0.5, 4.0  # steps that guesses may lose at first, and at most after they have won some


class Lookup:
    """The tokens of a sequence, and the earlier occurrences of its last ones."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.places: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]  # the place behind those tokens
        self.found: list[int | None] = [None] * len(LENGTHS)
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        ids = self.ids
        ids.append(token)
        for i, length in enumerate(LENGTHS):
            if len(ids) >= length:
                key = tuple(ids[-length:])
                self.found[i] = self.places[i].get(key)
                self.places[i][key] = len(ids)

    def guess(self, count: int) -> list[int]:
        """The tokens that followed the longest earlier occurrence of the last ones, the latest of its length.

        On reaching the end they repeat from the match, as repeated text does.
        """
        place = next((place for place in self.found if place is not None), None)
        if place is None or count < 1:
            return []
        following = self.ids[place : place + count]
        return (following * -(-count // len(following)))[:count]


class Account:
    """The balance of steps saved and steps lost by guesses; guessing stops while it is too low.

    The cost is counted, not timed, so that the same call guesses the same tokens every time.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.fixed, share = COST.get(device.type, COST["cpu"])
        self.each = rows * share / (1 + rows * share)  # of one more token in each row, in steps
        self.balance = START
        self.length = 4  # of the next guess

    def cost(self, guessed: int) -> float:
        """The cost, in single steps, of checking so many tokens in each row."""
        return self.fixed + guessed * self.each

    def allowed(self, most: int) -> int:
        """How many tokens may be guessed now."""
        return max(min(most, self.length, int((self.balance - self.fixed) / self.each)), 0)

    def step(self) -> None:
        """A step was made."""
        self.balance = min(self.balance + ALLOWANCE, MOST)

    def settle(self, guessed: int, right: float) -> None:
        """Book a check of `guessed` tokens in each row, of which `right` were right on average over unfinished rows."""
        self.balance = min(self.balance + right - self.cost(guessed), MOST)
        self.length = 2 * guessed if right >= guessed else max(int(right) + 1, 2)


def speculate(
    driver: DecoderDriver, rows: Rows, chooser: Chooser, prompt: Tensor, mask: Tensor | None, most: int
) -> Iterator[None]:
    """Make the rows' tokens, at most `most` guessed ones in a step."""
    prompts = real_tokens(prompt, mask)
    lookups = [Lookup(ids) for ids in prompts]
    held = [len(ids) for ids in prompts]  # tokens in the cache
    account = Account(len(prompts), prompt.device)

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
        ended = [r for r in going if rows.rows[r].done]
        going = [r for r in going if not rows.rows[r].done]
        if not going:
            return
        if ended:  # the steps of the others would run past the end of their caches
            held = [0 if rows.rows[r].done else held[r] for r in range(len(held))]
            driver.rewind(torch.tensor(held, dtype=torch.int32, device=prompt.device))
        account.step()
        allowed = account.allowed(most)
        guesses = {
            r: lookups[r].guess(allowed)[: rows.rows[r].limit - len(rows.rows[r].ids) - 1] for r in going
        }
        width = max(map(len, guesses.values()))
        last = [lookup.ids[-1] for lookup in lookups]
        if not width:
            if tokens is None or len(going) < len(last):  # a finished row's entry may be no token
                tokens = torch.tensor(last, device=prompt.device)
            tokens = take(driver.next(tokens), going)
            for r in range(len(held)):
                held[r] += 1
            continue
        tokens = None
        fed = [[last[r], *guesses.get(r, ())] for r in range(len(last))]
        ids = torch.tensor([row + [0] * (1 + width - len(row)) for row in fed], device=prompt.device)
        before = {r: len(lookups[r].ids) for r in going}
        logits = driver.extend(ids)
        right = going
        best = greedy(logits).tolist() if chooser.independent else None
        for place in range(1 + width):
            if best is None:
                take(logits[:, place], right)
            else:
                accept([row[place] for row in best], right)
            right = [
                r for r in right
                if place < len(guesses[r]) and lookups[r].ids[-1] == guesses[r][place] and not rows.rows[r].done
            ]  # fmt: skip
            if not right:
                break
        made = {r: len(lookups[r].ids) - before[r] for r in going}
        account.settle(width, sum(made.values()) / len(going) - 1)
        # the last token is not in the cache yet
        held = [held[r] + made[r] if r in made else 0 for r in range(len(held))]
        driver.rewind(torch.tensor(held, dtype=torch.int32, device=prompt.device))
