"""Continue prompts token by token: greedy or sampled, with a KV cache, for batches padded on either side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastattn.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Prompt and continuation ids, (B, S + n) with n <= max_new_tokens; runs in eval mode and restores the mode.

    Args:
        input_ids: (B, S) prompts, padded on either side where lengths differ.
        attention_mask: (B, S), nonzero = a real token; None = all are.
        max_new_tokens: most tokens to add; fewer where every row has met an end token.
        do_sample: draw from the distribution, else take the most likely token.
        temperature, top_k, top_p: divide the logits; keep the k likeliest tokens; then keep the likeliest tokens that
            together reach probability p. They need do_sample.
        eos_token_id: token or tokens that end a row; None = the config's, an empty sequence = none.
        pad_token_id: what follows the end token of a finished row; None = the config's, else the first end token.
        seed, generator: make sampling reproducible; at most one of them.
        use_cache: keep keys and values; without, every step recomputes the whole sequence, with the same result.
    """
    _check_options(do_sample, temperature, top_k, top_p, max_new_tokens)
    if seed is not None and generator is not None:
        raise ValueError("seed: give a seed or a generator, not both")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: got shape {tuple(input_ids.shape)}, needs (batch, length) with a token at least"
        )
    batch, prompt_len = input_ids.shape
    capacity = prompt_len + max_new_tokens
    if model.wpe is not None and capacity - 1 > model.config.n_positions:
        raise ValueError(
            f"max_new_tokens: a prompt of {prompt_len} and {max_new_tokens} more tokens do not fit into "
            f"n_positions={model.config.n_positions} learned positions"
        )
    ends, pad = _special_tokens(model, eos_token_id, pad_token_id, input_ids.device)
    if seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(seed)
    prompt, mask = _pad_left(input_ids, attention_mask)

    tokens = prompt.new_full((batch, capacity), pad)  # left-padded prompts, then what is generated
    tokens[:, :prompt_len] = prompt
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, max_new_tokens), value=True)
    unfinished = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    cache = model.new_cache(batch, capacity) if use_cache else None
    length = prompt_len
    with evaluating(model):
        while length < capacity:
            start = 0 if cache is None else cache[0].length
            seen = None if mask is None else mask[:, :length]
            out = model(tokens[:, start:length], attention_mask=seen, cache=cache, logits_to_keep=1)
            logits = out.logits[:, -1]  # (B, V)
            token = _sample(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
            tokens[:, length] = torch.where(unfinished, token, pad) if ends is not None else token
            length += 1
            if ends is not None:
                unfinished &= ~torch.isin(token, ends)
                if not unfinished.any():
                    break
    return torch.cat((input_ids, tokens[:, prompt_len:length]), dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_options(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 0 or more")
    if not do_sample:
        given = [n for n, v in (("top_k", top_k), ("top_p", top_p)) if v is not None]
        given += ["temperature"] if temperature != 1.0 else []
        if given:
            raise ValueError(f"{', '.join(given)}: shapes sampling, needs do_sample=True")
    if not temperature > 0.0:
        raise ValueError(
            f"temperature: got {temperature}, needs a positive number; do_sample=False is greedy"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, needs 1 or more")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: got {top_p}, needs 0 < top_p <= 1")


def _special_tokens(
    model: GPT, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None, device: torch.device
) -> tuple[Tensor | None, int]:
    """End tokens as a tensor (None for none) and the padding token."""
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    return (torch.tensor(ends, device=device) if ends else None), pad


def _pad_left(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts with their padding moved to the left and the bool mask to match; no mask where there is no padding."""
    if attention_mask is None:
        return input_ids, None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, needs {tuple(input_ids.shape)}, input_ids' own"
        )
    real = attention_mask != 0
    if bool(real.all()):
        return input_ids, None
    if not bool(real.any(-1).all()):
        raise ValueError("attention_mask: got a row without a real token, needs one at least in each")
    order = real.to(torch.uint8).argsort(dim=1, stable=True)  # padding first, tokens behind in their order
    return input_ids.gather(1, order), real.gather(1, order)


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token per row, drawn from (B, V) logits."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before already reach p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
