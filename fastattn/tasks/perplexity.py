"""The loss of every token of documents under a causal language model, each document on its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastattn.constants import IGNORE_INDEX
from fastattn.data.tokenization import Tokenizer
from fastattn.evaluation.language import language
from fastattn.evaluation.report import Report
from fastattn.nn.modes import evaluating

BATCH_SIZE = 8
HELD_TOKENS = 1 << 20  # of windows that are held at once, and sorted by length


class Window(NamedTuple):
    """Tokens that the model reads together; those from `scored` on count."""

    ids: list[int]
    scored: int


def bos_of(model: Any, tokenizer: Tokenizer) -> int | None:
    """The BOS that the model expects before a text; None where it expects none.

    It is the one that the tokenizer's template adds, else config.bos_token_id where the tokenizer has it.
    """
    front = template_front(tokenizer)
    if front:
        return front[-1]
    named = getattr(model.config, "bos_token_id", None)
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    return int(named) if isinstance(named, int) and 0 <= named < vocab_size else None


def template_front(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer's template adds before a text."""
    core = tokenizer.core
    plain, whole = core.encode("a", add_special_tokens=False).ids, core.encode("a").ids
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def windows_of(ids: Sequence[int], bos_id: int | None, length: int, stride: int) -> Iterator[Window]:
    """The windows of a document in which every token is predicted once, the first token only after a BOS.

    A window has at most `length` tokens and begins with the BOS. Each window after the first predicts `stride` tokens
    that no earlier window did.
    """
    front = [] if bos_id is None else [bos_id]
    room = length - len(front)
    end = min(room, len(ids))
    if len(front) + end > 1:
        yield Window([*front, *ids[:end]], 1)
    while end < len(ids):
        before, end = end, min(end + stride, len(ids))
        begin = max(0, end - room)
        yield Window([*front, *ids[begin:end]], len(front) + before - begin)


@torch.no_grad()
def evaluate_documents(
    model: Any,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    batch_size: int = BATCH_SIZE,
    max_length: int,
    stride: int | None = None,
) -> Report:
    """loss, perplexity, bits_per_byte and unknown over all texts, see `fastattn.evaluation.language`.

    Documents do not attend to each other. A document longer than `max_length` tokens is read in overlapping windows, so
    that a token has at least max_length - stride tokens before it. The first token of a text counts only if the model
    expects a BOS, which predicts it; otherwise neither the token nor its bytes count.

    Args:
        stride: tokens that each further window predicts; None for half of max_length.
    """
    bos_id = bos_of(model, tokenizer)
    step = max(1, max_length // 2) if stride is None else stride
    if not 1 <= step < max_length:
        raise ValueError(f"stride: got {step}, needs at least 1 and less than max_length, {max_length}")
    unknown_id = unknown_of(tokenizer)
    windows: list[Window] = []
    size = documents = held = 0
    loss_sum, tokens, unknown = 0.0, 0, 0

    def score() -> None:
        nonlocal loss_sum, tokens, unknown
        for ids, labels in _batches(windows, batch_size):
            count = int((labels != IGNORE_INDEX).sum())
            output = model(ids.to(device), labels=labels.to(device), return_logits=False)
            loss_sum += float(output.loss) * count
            tokens += count
            unknown += 0 if unknown_id is None else int((labels == unknown_id).sum())
        windows.clear()

    device = next(model.parameters()).device
    with evaluating(model):
        for text in texts:
            encoding = tokenizer.core.encode(text, add_special_tokens=False)
            read = False
            for window in windows_of(encoding.ids, bos_id, max_length, step):
                read = True
                windows.append(window)
                held += len(window.ids)
                if held >= HELD_TOKENS:
                    score()
                    held = 0
            if read:
                documents += 1
                unread = "" if bos_id is not None else text[: encoding.offsets[0][1]]
                size += len(text.encode()) - len(unread.encode())
        if not documents:
            raise ValueError("texts: got none with a token that can be predicted, needs at least one")
        score()
    return language(loss_sum, tokens, max(size, 1), unknown=unknown, documents=documents)


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels (B, S) of windows, the longest first; padding is on the right, where no token attends to it."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = [windows[i] for i in order[start : start + batch_size]]
        ids = torch.zeros(len(chosen), len(chosen[0].ids), dtype=torch.int64, device="cpu")
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, window in enumerate(chosen):
            ids[row, : len(window.ids)] = torch.tensor(window.ids, device="cpu")
            labels[row, window.scored : len(window.ids)] = ids[row, window.scored : len(window.ids)]
        yield ids, labels


def unknown_of(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token; None where there is none."""
    token = getattr(tokenizer.core.model, "unk_token", None)
    return None if token is None else tokenizer.core.token_to_id(token)
