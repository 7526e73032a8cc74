"""Beam search: the continuations of the greatest log-probability by their length, in transformers' definition.

Every beam's candidates are its log-probability plus that of each next token. Of the best ones of a prompt, those among
the first num_beams that end join the finished ones with score log-probability / length ** length_penalty; the best that
go on are the next beams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.generation.choosing import Scores, refuse_not_finite
from fastattn.generation.drivers import driver_of
from fastattn.generation.options import Settled
from fastattn.generation.protocol import CausalLM
from fastattn.generation.stopping import special_tokens

NEVER = -1e9  # the score of what is no candidate; a log-probability of -inf is below it


class Finished:
    """The best finished continuations of each prompt, the best one first."""

    def __init__(self, prompts: int, beams: int, room: int, device: torch.device) -> None:
        self.ids = torch.zeros(prompts, beams, room, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(prompts, beams, dtype=torch.int64, device=device)
        self.scores = torch.full((prompts, beams), NEVER, device=device)
        self.real = torch.zeros(prompts, beams, dtype=torch.bool, device=device)  # False: none there yet

    def add(self, ids: Tensor, length: int, scores: Tensor, real: Tensor) -> None:
        """Candidates (P, C, room) of a length with scores (P, C); only those where `real` (P, C) have finished."""
        beams = self.scores.shape[1]
        lengths = torch.full_like(scores, length, dtype=torch.int64)
        merged = torch.cat((self.scores, scores), 1).topk(beams, dim=1)
        best = merged.indices
        self.scores = merged.values
        self.ids = _pick(torch.cat((self.ids, ids), 1), best)
        self.lengths = torch.cat((self.lengths, lengths), 1).gather(1, best)
        self.real = torch.cat((self.real, real), 1).gather(1, best)


@torch.no_grad()
def beam_search(model: CausalLM, prompt: Tensor, mask: Tensor | None, options: Settled) -> Tensor:
    """Prompts and their num_return_sequences best continuations, (P * num_return_sequences, S + n).

    Args:
        prompt: (P, S) ids.
        mask: (P, S) bool, True = a real token; None = all are.
    """
    prompts, beams, room, device = len(prompt), options.num_beams, options.max_new_tokens, prompt.device
    copies = options.num_return_sequences
    end_ids, pad = special_tokens(
        model, options.eos_token_id, options.pad_token_id, several=prompts * copies > 1
    )
    if room == 0 or prompts == 0:
        return prompt.repeat_interleave(copies, 0)
    ends = torch.tensor(end_ids, dtype=torch.int64, device=device)
    repeated = prompt.repeat_interleave(beams, 0)
    real = None if mask is None else mask.repeat_interleave(beams, 0)
    scores = Scores(options, repeated, real, model.config.vocab_size, end_ids)
    driver = driver_of(
        model, prompt, mask, room, beams, use_cache=options.use_cache, batch_invariant=options.batch_invariant,
        chunk_size=options.prefill_chunk_size,
    )  # fmt: skip
    count = max(2, 1 + len(end_ids)) * beams  # candidates, so that num_beams of them do not end
    first = torch.arange(prompts, device=device)[:, None] * beams
    ids = torch.zeros(prompts, beams, room, dtype=torch.int64, device=device)
    running = torch.full((prompts, beams), NEVER, device=device)
    running[:, 0] = 0.0  # the beams of a prompt are equal at first
    finished = Finished(prompts, beams, room, device)
    hopeful = torch.ones(prompts, 1, dtype=torch.bool, device=device)  # a better one may yet be found
    among_first = torch.arange(count, device=device) < beams

    tokens = first.new_zeros(0)  # of the beams
    for length in range(1, room + 1):
        logits = driver.first() if length == 1 else driver.next(tokens)
        log_probs = scores(logits.float().log_softmax(-1))  # (P * beams, V)
        if not bool(log_probs.amax(-1).isfinite().all()):
            refuse_not_finite(length - 1)
        vocab_size = log_probs.shape[-1]
        totals = (log_probs.view(prompts, beams, -1) + running[:, :, None]).flatten(1)
        best = totals.topk(min(count, totals.shape[1]), dim=1)
        beam, token = best.indices // vocab_size, best.indices % vocab_size
        candidates = _pick(ids, beam)
        candidates[:, :, length - 1] = token
        ended = torch.isin(token, ends) if length < room else torch.ones_like(token, dtype=torch.bool)

        going = (best.values + ended * NEVER).topk(beams, dim=1)
        running, ids = going.values, _pick(candidates, going.indices)
        tokens = ids[:, :, length - 1].flatten()

        has_ended = ended & among_first[: token.shape[1]]
        full = finished.real.all(1, keepdim=True) & (options.early_stopping is True)
        ranked = best.values / length**options.length_penalty
        ranked = ranked + (full | ~hopeful | ~has_ended) * NEVER
        finished.add(candidates, length, ranked, has_ended)

        hopeful = hopeful & _may_improve(running, finished, length, options)
        if length == room or not bool(hopeful.any()):
            break
        if options.early_stopping is True and bool(finished.real.all()):
            break
        rows = (beam.gather(1, going.indices) + first).flatten()
        driver.reorder(rows)
        if scores.changes:
            scores.reorder(rows)
            scores.add(tokens)

    made = finished.ids[:, :copies].flatten(0, 1)
    lengths = finished.lengths[:, :copies].flatten()
    longest = int(lengths.max())
    # transformers fills with the first end token where the padding token is 0
    fill = end_ids[0] if end_ids and pad == 0 else pad
    beyond = torch.arange(longest, device=device) >= lengths[:, None]
    made = made[:, :longest].masked_fill(beyond, fill).to(prompt.dtype)
    return torch.cat((prompt.repeat_interleave(copies, 0), made), 1)


def _may_improve(running: Tensor, finished: Finished, length: int, options: Settled) -> Tensor:
    """Whether a beam that goes on may come to a better score than the worst finished one, (P, 1)."""
    to_come = options.early_stopping == "never" and options.length_penalty > 0.0
    longest = options.max_new_tokens if to_come else length
    best = running[:, :1] / longest**options.length_penalty
    worst = torch.where(finished.real, finished.scores.amin(1, keepdim=True), NEVER)
    return (best > worst).any(1, keepdim=True)


def _pick(ids: Tensor, which: Tensor) -> Tensor:
    """ids (P, N, room) of those numbers (P, M), (P, M, room)."""
    return ids.gather(1, which[:, :, None].expand(-1, -1, ids.shape[2]))
