"""One step of a running batch: parts of prompts are read, and every other continuation gets a token."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.generation.choosing import greedy
from fastattn.integers import cdiv
from fastattn.models import GPT
from fastattn.models.paged import PagedDecoder
from fastattn.serve.engine.pages import PagePool, PagesExhausted, names_of
from fastattn.serve.engine.requests import (
    UNLOGGED,
    Continuation,
    DeadlineError,
    Output,
    Request,
    TokenScore,
    scores_of,
)

log = logging.getLogger("fastattn.serve")
READ_ALONE = 256  # tokens of prompts that a step reads where no continuation waits for one
# Rows of a step up to which prompts of up to two chunks are read beyond what a step reads of a long one: a product
# takes little longer for these, and each adds a continuation to all steps that follow.
MOST_ROWS = 64


class Batch:
    """The continuations that run and those that wait, over one model's pages. One thread uses it."""

    def __init__(
        self, model: GPT, pages: int, page_size: int, max_length: int, max_batch: int, batch_invariant: bool
    ) -> None:
        self.decoder = PagedDecoder(model, pages, page_size, max_length, batch_invariant=batch_invariant)
        self.pool = PagePool(pages, page_size)
        self.device = model.wte.weight.device
        self.max_batch, self.page_size = max_batch, page_size
        self.chunks = page_size // self.decoder.chunk_size  # of a page
        self.sharing = not self.decoder.keys_depend_on_length
        self.running: list[Continuation] = []  # in the order of arrival, as are
        self.waiting: list[Continuation] = []
        self.preemptions = self.shared_tokens = self.prompt_tokens = self.made_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """A settled request waits for its turn. Its continuations but the first follow once the prompt is read."""
        for continuation in request.sequences:
            continuation.order = (request.number, continuation.index)
        self.waiting.append(request.sequences[0])
        self.waiting.sort(key=lambda each: each.order)

    def step(self) -> None:
        """One step. What fails ends the request that it is of, and no other."""
        self._drop()
        self._admit()
        decoding = [each for each in self.running if not each.reading]
        chunk = self.decoder.chunk_size
        budget = max(chunk, len(decoding)) if decoding else READ_ALONE
        rows = len(decoding)
        reads: list[tuple[Continuation, int]] = []  # and where the part of the prompt ends
        for each in list(self.running):
            left = len(each.prompt) - each.held
            short = len(each.prompt) <= 2 * chunk and 0 < left <= MOST_ROWS - rows
            if not (each.reading and (budget > 0 or short) and each in self.running):
                continue
            if each.held >= len(each.prompt):
                budget -= self._read_again(each)
                continue
            chunks = each.held // chunk + max(budget // chunk, 1)
            end = len(each.prompt) if short else min(chunks * chunk, len(each.prompt))
            if self._grow(each, end):
                reads.append((each, end))
                budget -= end - each.held
                rows += end - each.held
        # those of the same length run in the same operations
        ready = sorted(
            (each for each in decoding if each in self.running and self._has_room(each)),
            key=lambda each: each.held,
        )
        # one that came later may have lost its pages meanwhile
        reads = [(each, end) for each, end in reads if each in self.running]
        ready = [each for each in ready if each in self.running]
        if reads or ready:
            self._pass(reads, ready)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error."""
        if not isinstance(error, UNLOGGED):
            log.error("request %d failed", request.number, exc_info=error)
        if self._leave(request):
            request.tell(Output(error=error))

    def _leave(self, request: Request) -> bool:
        """Free everything that a request has; whether it was there."""
        mine = [each for each in (*self.running, *self.waiting) if each.request is request]
        for each in mine:
            self._release(each)
        self.running = [each for each in self.running if each.request is not request]
        self.waiting = [each for each in self.waiting if each.request is not request]
        request.unfinished = 0
        return bool(mine)

    def _drop(self) -> None:
        now = time.monotonic()
        for request in dict.fromkeys(each.request for each in (*self.running, *self.waiting)):
            if request.cancelled.is_set():
                self._leave(request)
            elif request.deadline is not None and now > request.deadline:
                self.fail(request, DeadlineError("the request took longer than it may"))

    def _admit(self) -> None:
        """Continuations join as long as there is a place in the batch and there are pages for what they hold."""
        while self.waiting and len(self.running) < self.max_batch:
            each = self.waiting[0]
            found = self._shared_pages(each)
            # with a place for the next token, except behind a prompt that leaves none
            held = min(each.wanted + 1, self.decoder.max_length)
            needed = cdiv(held, self.page_size) - len(found)
            unheld = sum(not self.pool.holders[page] for page in found)
            if self.pool.available - unheld < needed:
                return
            self.waiting.pop(0)
            for page in found:
                self.pool.hold(page)
            each.pages, each.held = found, len(found) * self.page_size
            self._run(each)  # first, so that an error of the copy ends the request
            try:
                self._copy_shared_part(each)
            except Exception as error:
                self.fail(each.request, error)
            self.shared_tokens += each.held

    def _run(self, each: Continuation) -> None:
        self.running.append(each)
        self.running.sort(key=lambda other: other.order)

    def _shared_pages(self, each: Continuation) -> list[int]:
        """Pages with the beginning of a prompt."""
        return self.pool.begin_with(self._shareable(each)[self.chunks - 1 :: self.chunks])

    def _copy_shared_part(self, each: Continuation) -> None:
        """Copy what some page has of the prompt's next one, which becomes the continuation's own."""
        held = len(each.pages) * self.chunks
        for end in range(min(held + self.chunks - 1, len(self._shareable(each))), held, -1):
            source = self.pool.page_of(self._shareable(each)[end - 1])
            if source is None:
                continue
            self.pool.hold(source)  # else it may be the one that is taken
            try:
                if self.pool.available:
                    each.pages.append(self.pool.take())
                    self.decoder.copy_page(source, each.pages[-1])
                    each.held = end * self.decoder.chunk_size
            except (torch.OutOfMemoryError, MemoryError):
                pass  # the part is read instead
            finally:
                self.pool.release(source)
            return

    def _shareable(self, each: Continuation) -> list[bytes]:
        """The names of what a prompt may share; its last token is always read, for the logits after it."""
        if not self.sharing or (each.request.prompt_scores is not None and not each.made):
            return []
        return self._names(each)[: (len(each.prompt) - 1) // self.decoder.chunk_size]

    def _names(self, each: Continuation) -> list[bytes]:
        """The names of a prompt's chunks."""
        if each.names is None:
            size = self.decoder.chunk_size
            each.names = names_of(each.prompt, size, len(each.prompt) // size)
        return each.names

    def _out_of_memory(self, error: Exception, request: Request) -> None:
        """The latest continuation waits; where there is no other, the request fails."""
        if len(self.running) > 1:
            self._preempt(self.running[-1])
        else:
            self.fail(request, error)

    def _failed(self, error: Exception, request: Request) -> None:
        """What one request alone ran into ends it, but for a lack of memory, which others may cause."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            self._out_of_memory(error, request)
        else:
            self.fail(request, error)

    def _read_again(self, each: Continuation) -> int:
        """Compute the next chunk of what was made before a preemption; how many tokens that were."""
        chunk = self.decoder.chunk_size
        end = min((each.held // chunk + 1) * chunk, each.wanted)
        if not self._grow(each, end):
            return 0
        tokens = [each.token(place) for place in range(each.held, end)]
        try:
            ids = torch.tensor(tokens, device=self.device)
            self.decoder.append_several(ids, each.held, self._table([each]))
        except Exception as error:
            self._failed(error, each.request)
        else:
            each.held = end
        return len(tokens)

    def _pass(self, reads: Sequence[tuple[Continuation, int]], ready: Sequence[Continuation]) -> None:
        """Read parts of prompts and append the last token of every continuation that is ready, in one pass.

        An error ends the request that it is of, which shows when each runs alone.
        """
        try:
            hidden, logits = self._computed(reads, ready)
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._out_of_memory(error, (ready[0] if ready else reads[0][0]).request)
            return
        except Exception as error:
            if len(reads) + len(ready) == 1:
                self.fail((ready[0] if ready else reads[0][0]).request, error)
                return
            for read in reads:
                if read[0] in self.running:
                    self._pass([read], ())
            for each in ready:
                if each in self.running:
                    self._pass((), [each])
            return
        parts = [(each, end, end - each.held, self._begins(each, end)) for each, end in reads]
        self._chosen(ready, logits[: len(ready)])
        start, place = 0, len(ready)
        for each, end, count, begins in parts:
            if each in self.running:  # else it is of a request that failed just now
                try:
                    self._has_read(each, end, hidden[start : start + count])
                    if begins:
                        self._begin(each, logits[place : place + 1])
                except Exception as error:
                    self.fail(each.request, error)
            start, place = start + count, place + begins

    def _computed(
        self, reads: Sequence[tuple[Continuation, int]], ready: Sequence[Continuation]
    ) -> tuple[Tensor, Tensor]:
        """The final hidden states of prompts' parts (S of each, E), and logits after the tokens of those that are ready
        and after the prompts that end (N, V)."""
        parts = [self.decoder.part(each.prompt, each.held, end, self._table([each])) for each, end in reads]
        tokens = torch.tensor([each.made[-1] for each in ready], dtype=torch.int64, device=self.device)
        lengths = torch.tensor([each.held for each in ready], dtype=torch.int32, device=self.device)
        hidden = self.decoder.run(parts, tokens, lengths, self._table(ready))
        counts = [part.ids.shape[0] for part in parts]
        wanted, start = list(range(sum(counts), len(hidden))), 0
        for (each, end), count in zip(reads, counts):
            start += count
            wanted += [start - 1] if self._begins(each, end) else []
        # of so many rows at most: those that decode and one of each prompt
        logits = self.decoder.logits_of(hidden[wanted]) if wanted else hidden[:0]
        return hidden, logits

    @staticmethod
    def _begins(each: Continuation, end: int) -> bool:
        """Whether a prompt is read once its part up to `end` is, and its first token is to be chosen."""
        return end == len(each.prompt) and not each.made

    def _has_read(self, each: Continuation, end: int, hidden: Tensor) -> None:
        """A part of a prompt is in the cache; its final hidden states are (S, E)."""
        self.prompt_tokens += end - each.held
        if each.request.prompt_scores is not None and not each.made:
            self._score_prompt(each, hidden, end)
        if self.sharing:
            size = self.decoder.chunk_size
            for place in range(each.held // size, end // size):
                self.pool.name(each.pages[place // self.chunks], self._names(each)[place])
        each.held = end

    def _begin(self, each: Continuation, logits: Tensor) -> None:
        """A prompt is read: the request's other continuations share its pages, and each gets its first token."""
        family = each.request.sequences
        for other in family if each.index == 0 else [each]:
            if other is not each:
                for page in each.pages:
                    self.pool.hold(page)
                other.pages, other.held = list(each.pages), each.held
                other.prompt_scores = list(each.prompt_scores)
                self._run(other)
        for other in family if each.index == 0 else [each]:
            self._accept(other, other.choose(logits), logits)
        for other in self.running[self.max_batch :]:  # beyond the batch; they wait, with their first token
            self._wait(other)

    def _chosen(self, those: Sequence[Continuation], logits: Tensor) -> None:
        """The last token of each is in the cache; choose the next by the logits (N, V)."""
        likeliest: list[int] | None = None
        if any(each.plain for each in those):
            likeliest = greedy(logits).tolist()
        for place, each in enumerate(those):
            if each not in self.running:  # another continuation of its request failed just now
                continue
            each.held += 1
            row = logits[place : place + 1]
            try:
                token = likeliest[place] if likeliest and each.plain else each.choose(row)
                self._accept(each, token, row)
            except Exception as error:
                self.fail(each.request, error)

    def _accept(self, each: Continuation, token: int, logits: Tensor) -> None:
        """Append a chosen token to a continuation, and send what is complete of its text and scores."""
        row, request = each.row, each.request
        self.made_tokens += not row.done
        news = each.accept(token, logits)
        if row.done:
            self._release(each)
            self.running.remove(each)
            request.unfinished -= 1
        if row.done or news.text or news.tokens or news.prompt_scores:
            request.tell(news)

    def _score_prompt(self, each: Continuation, hidden: Tensor, end: int) -> None:
        """The scores of the prompt's tokens that follow those just read."""
        top = each.request.prompt_scores
        assert top is not None
        if not each.held:
            each.prompt_scores.append(TokenScore(each.prompt[0], None))
        following = each.prompt[each.held + 1 : end + 1]
        if following:
            each.prompt_scores += scores_of(self.decoder.logits_of(hidden[: len(following)]), following, top)

    def _has_room(self, each: Continuation) -> bool:
        """Whether a continuation has a page of its own for the next token."""
        if each not in self.running or not self._grow(each, each.held + 1):
            return False
        last = each.held // self.page_size
        if self.pool.holders[each.pages[last]] > 1:
            copied = self._take_for(each)
            if copied is None:
                return False
            if self.pool.holders[each.pages[last]] == 1:  # the others were preempted meanwhile
                self.pool.release(copied)
                return True
            try:
                self.decoder.copy_page(each.pages[last], copied)
            except Exception as error:
                self.pool.release(copied)
                self._failed(error, each.request)
                return False
            self.pool.release(each.pages[last])
            each.pages[last] = copied
        return True

    def _grow(self, each: Continuation, length: int) -> bool:
        """Give a continuation pages for so many tokens; False if it had to make room for an earlier one."""
        while len(each.pages) * self.page_size < length:
            page = self._take_for(each)
            if page is None:
                return False
            each.pages.append(page)
        return True

    def _take_for(self, each: Continuation) -> int | None:
        """A page; where there is none the latest continuations lose theirs. None if that is this one."""
        while True:
            try:
                return self.pool.take()
            except PagesExhausted:
                latest = self.running[-1]
                self._preempt(latest)
                if latest is each:
                    return None

    def _preempt(self, each: Continuation) -> None:
        """A continuation makes room for others."""
        self._wait(each)
        self.preemptions += 1

    def _wait(self, each: Continuation) -> None:
        """A continuation gives its pages back and waits; what they held is computed again later, with the same bits."""
        self._release(each)
        if not each.made:
            each.prompt_scores.clear()  # they are made again with the prompt
        self.running.remove(each)
        self.waiting.append(each)
        self.waiting.sort(key=lambda other: other.order)

    def _release(self, each: Continuation) -> None:
        for page in reversed(each.pages):  # the beginning of a prompt is kept longest
            self.pool.release(page)
        each.pages, each.held = [], 0

    def _table(self, those: Sequence[Continuation]) -> Tensor:
        longest = max((len(each.pages) for each in those), default=0)
        rows = [each.pages + [0] * (longest - len(each.pages)) for each in those]
        return torch.tensor(rows, dtype=torch.int32, device=self.device).view(len(rows), longest)
