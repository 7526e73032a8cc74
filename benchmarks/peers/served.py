"""transformers' ways to answer the prompts that a server gets at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ALONE = 2  # prompts of a round that run one at a time: their time for each token is that of all
Sample = Callable[[], float]  # seconds


def one_at_a_time(folder: Path, of: Sequence[Sequence[int]], tokens: int, dtype: torch.dtype) -> Sample:
    """Seconds of a token of `generate`, for prompts one after the other."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    chosen = [torch.tensor([list(each)]) for each in of[len(of) // 2 :][:ALONE]]
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 1}

    def sample() -> float:
        started = time.perf_counter()
        for ids in chosen:
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return (time.perf_counter() - started) / (len(chosen) * tokens)

    return sample


def generate_batch(folder: Path, of: Sequence[Sequence[int]], tokens: int, dtype: torch.dtype) -> Sample:
    """Seconds of a token of `generate_batch`, for all prompts."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=1, use_cache=True
    )
    inputs = [list(each) for each in of]

    def sample() -> float:
        started = time.perf_counter()
        made = model.generate_batch(inputs, generation_config=config, progress_bar=False)
        took = time.perf_counter() - started
        count = sum(len(each.generated_tokens) for each in made.values())
        if count != len(inputs) * tokens:
            raise ValueError(f"it made {count} tokens, needs {len(inputs) * tokens}")
        return took / count

    return sample
