"""Continue prompts token by token: greedy or sampled, with a KV cache, for batches padded on either side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.generation.protocol import CausalLM, Decoder
from fastattn.generation.sampling import check_generator, check_sampling, sample
from fastattn.generation.stopping import special_tokens
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor, is_integer

MAX_TOKENS = 2**31 - 1  # positions are 32-bit integers


@torch.no_grad()
def generate(
    model: CausalLM,
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
    batch_invariant: bool = False,
) -> Tensor:
    """Prompt and continuation ids, (B, S + n) with n <= max_new_tokens; runs in eval mode and restores the mode.

    Args:
        input_ids: (B, S) prompts, padded on either side where lengths differ.
        attention_mask: (B, S), nonzero = a real token; None = all are.
        max_new_tokens: most tokens to add; fewer where every row has met an end token.
        do_sample: draw from the distribution, else take the most likely token.
        temperature, top_k, top_p: divide the logits; keep the k likeliest tokens; then keep the likeliest tokens that
            together reach probability p. They need do_sample.
        eos_token_id: token or tokens of the vocabulary that end a row; None = the config's, an empty sequence = none.
        pad_token_id: what follows the end token of a finished row; None = the config's, else the first end token.
        seed, generator: make sampling reproducible; at most one of them.
        use_cache: keep keys and values; without, every step recomputes the whole sequence, with the same result.
        batch_invariant: logits, and so the tokens of a greedy continuation, have the bits that their row has alone.
            Slower: prompts are read one by one, and a step's products made in blocks of a fixed number of rows.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: an argument is out of range, or the model's logits are not finite.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in INTEGER_DTYPES:
        got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        raise ValueError(f"input_ids: got {got}, needs integers of shape (batch, length), a token at least")
    for name, flag in (("use_cache", use_cache), ("batch_invariant", batch_invariant)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, needs True or False")
    if batch_invariant and not use_cache:
        raise ValueError("batch_invariant: got True with use_cache=False, needs a cache")
    if not is_integer(max_new_tokens):
        raise TypeError(f"max_new_tokens: got {max_new_tokens!r}, needs an integer")
    if not 0 <= max_new_tokens <= MAX_TOKENS:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 0 or more, at most {MAX_TOKENS}")
    check_sampling(do_sample, temperature, top_k, top_p)
    check_generator(seed, generator)
    batch, prompt_len = input_ids.shape
    capacity = prompt_len + max_new_tokens
    if model.max_positions is not None and capacity - 1 > model.max_positions:
        raise ValueError(
            f"max_new_tokens: a prompt of {prompt_len} and {max_new_tokens} more tokens do not fit into "
            f"n_positions={model.max_positions} learned positions"
        )
    ends, pad = special_tokens(model, eos_token_id, pad_token_id, input_ids.device)
    if seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(seed)
    mask = _mask_of(input_ids, attention_mask)
    made = input_ids.new_full((batch, max_new_tokens), pad)
    unfinished = torch.ones(batch, dtype=torch.bool, device=made.device)
    count = 0
    with evaluating(model):
        next_logits = _steps(model, input_ids, mask, capacity, use_cache, batch_invariant)
        token = None
        while count < max_new_tokens:
            logits = next_logits(token)  # (B, V)
            most, token = logits.max(-1)
            if not all(map(math.isfinite, most.tolist())):  # a NaN is the greatest of its row
                raise ValueError(
                    f"model: its logits for token {count} after the prompt are not finite, "
                    f"so no token can be chosen; look for NaN or infinite weights"
                )
            if do_sample:
                token = sample(logits, temperature, top_k, top_p, generator)
            if ends is not None:
                token = torch.where(unfinished, token, pad)
            made[:, count] = token
            count += 1
            if ends is not None:
                unfinished &= ~torch.isin(token, ends)
                if not unfinished.any():
                    break
    return torch.cat((input_ids, made[:, :count]), dim=1)


def _steps(
    model: CausalLM,
    input_ids: Tensor,
    mask: Tensor | None,
    capacity: int,
    use_cache: bool,
    batch_invariant: bool,
) -> Callable[[Tensor | None], Tensor]:
    """The function from the tokens chosen last, None at first, to the logits of the next ones, (B, V)."""
    make = getattr(model, "decoder", None)
    decoder = make(len(input_ids), capacity, batch_invariant=batch_invariant) if make and use_cache else None
    if decoder is not None:
        return _decoder_steps(decoder, input_ids, mask)
    if batch_invariant:
        raise ValueError("batch_invariant: this model has no decoder, which it needs")
    return _model_steps(model, input_ids, mask, capacity, use_cache)


def _decoder_steps(
    decoder: Decoder, prompt: Tensor, mask: Tensor | None
) -> Callable[[Tensor | None], Tensor]:
    lengths = None
    if mask is not None:
        lengths = mask.sum(1)
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # tokens first, in their order
        prompt = prompt.gather(1, order)[:, : int(lengths.max())]

    def steps(tokens: Tensor | None) -> Tensor:
        return decoder.prefill(prompt, lengths) if tokens is None else decoder.step(tokens)

    return steps


def _model_steps(
    model: CausalLM, prompt: Tensor, mask: Tensor | None, capacity: int, use_cache: bool
) -> Callable[[Tensor | None], Tensor]:
    batch, length = prompt.shape
    if mask is not None:
        order = mask.to(torch.uint8).argsort(
            dim=1, stable=True
        )  # padding first, tokens behind in their order
        prompt = prompt.gather(1, order)
        mask = F.pad(mask.gather(1, order), (0, capacity - length), value=True)
    ids = F.pad(prompt, (0, capacity - length))
    cache = model.new_cache(batch, capacity) if use_cache else None

    def steps(tokens: Tensor | None) -> Tensor:
        nonlocal length
        first = 0
        if tokens is not None:
            ids[:, length] = tokens
            first = 0 if cache is None else length
            length += 1
        seen = None if mask is None else mask[:, :length]
        return model.step(ids[:, first:length], cache, seen)

    return steps


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in. What is no module has no mode."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _mask_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The bool mask of real tokens; None where there is no padding."""
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, needs {tuple(input_ids.shape)}, input_ids' own"
        )
    real = attention_mask != 0
    if bool(real.all()):
        return None
    if not bool(real.any(-1).all()):
        raise ValueError("attention_mask: got a row without a real token, needs one at least in each")
    return real
