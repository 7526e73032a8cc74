"""An engine of a small model, and requests with all that came of them."""

from __future__ import annotations

from typing import Any

import torch
from small_models import GPT2, VOCAB

from fastattn.generation import generate
from fastattn.generation.options import Options
from fastattn.models import GPT, GPTConfig
from fastattn.serve.engine import Engine, Output, Request

PAGE = 8


def make_model(**extra: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**GPT2, **extra})).eval()


def make_engine(model: GPT, pages: int, page_size: int = PAGE, **options: Any) -> Engine:
    config = model.config
    of_page = 2 * config.n_layer * config.kv_heads * page_size * config.head_dim * 4
    return Engine(model, page_size=page_size, kv_memory=pages * of_page, **options)


class Asked:
    """A request and all that came of it."""

    def __init__(self, prompt: list[int], copies: int = 1, scores: int | None = None, **options: Any) -> None:
        own = {n: options.pop(n) for n in ("prompt_scores", "deadline", "tokenizer") if n in options}
        self.prompt, self.options = prompt, options
        self.outputs: list[Output] = []
        chosen = Options(eos_token_id=(), **options)
        self.request = Request(prompt, chosen, self.outputs.append, copies=copies, scores=scores, **own)

    def tokens(self, index: int = 0) -> list[int]:
        return [token for out in self.outputs if out.index == index for token in out.tokens]

    def alone(self, model: GPT, chunk: int = PAGE, **more: Any) -> list[list[int]]:
        made = generate(
            model, torch.tensor([self.prompt]), eos_token_id=(), batch_invariant=True, prefill_chunk_size=chunk,
            **self.options, **more,
        )  # fmt: skip
        return made[:, len(self.prompt) :].tolist()

    @property
    def error(self) -> Exception | None:
        return next((out.error for out in self.outputs if out.error), None)


def run(engine: Engine, *asked: Asked, most: int = 500) -> None:
    for each in asked:
        engine.submit(each.request)
    finish(engine, most)


def finish(engine: Engine, most: int = 500) -> None:
    for _ in range(most):
        if not engine.queued and not engine.batch.busy:
            break
        engine._step()
    assert not engine.batch.busy
    assert engine.stats()["pages_held"] == 0


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
