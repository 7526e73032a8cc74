"""Continue prompts token by token: greedy or sampled, with a KV cache, for batches padded on either side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor, is_integer, is_number

if TYPE_CHECKING:
    from fastattn.models.gpt import GPT

MAX_TOKENS = 2**31 - 1  # positions are 32-bit integers
COLD = 1e-3  # below it, logits are shifted before they are divided by the temperature, which could overflow


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
        eos_token_id: token or tokens of the vocabulary that end a row; None = the config's, an empty sequence = none.
        pad_token_id: what follows the end token of a finished row; None = the config's, else the first end token.
        seed, generator: make sampling reproducible; at most one of them.
        use_cache: keep keys and values; without, every step recomputes the whole sequence, with the same result.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: an argument is out of range, or the model's logits are not finite.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in INTEGER_DTYPES:
        got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        raise ValueError(f"input_ids: got {got}, needs integers of shape (batch, length), a token at least")
    _check_options(do_sample, temperature, top_k, top_p, max_new_tokens, use_cache)
    _check_generator(seed, generator)
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
            if not all(map(math.isfinite, logits.amax(-1).tolist())):  # a NaN is the greatest of its row
                raise ValueError(
                    f"model: its logits for token {length - prompt_len} after the prompt are not finite, "
                    f"so no token can be chosen; look for NaN or infinite weights"
                )
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
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    max_new_tokens: int,
    use_cache: bool,
) -> None:
    for name, flag in (("do_sample", do_sample), ("use_cache", use_cache)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, needs True or False")
    for name, number in (("max_new_tokens", max_new_tokens), ("top_k", 1 if top_k is None else top_k)):
        if not is_integer(number):
            raise TypeError(f"{name}: got {number!r}, needs an integer")
    for name, value in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if isinstance(value, bool) or not is_number(value):
            raise TypeError(f"{name}: got {value!r}, needs a number")
    if not 0 <= max_new_tokens <= MAX_TOKENS:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 0 or more, at most {MAX_TOKENS}")
    if not do_sample:
        given = [n for n, v in (("top_k", top_k), ("top_p", top_p)) if v is not None]
        given += ["temperature"] if temperature != 1.0 else []
        if given:
            raise ValueError(f"{', '.join(given)}: shapes sampling, needs do_sample=True")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"temperature: got {temperature}, needs a positive finite number; do_sample=False is greedy"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, needs 1 or more")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: got {top_p}, needs 0 < top_p <= 1")


def _check_generator(seed: int | None, generator: torch.Generator | None) -> None:
    if seed is not None and generator is not None:
        raise ValueError("seed: give a seed or a generator, not both")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, needs a torch.Generator")
    if seed is None:
        return
    if not is_integer(seed):
        raise TypeError(f"seed: got {seed!r}, needs an integer")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, needs a 64-bit integer")


def _special_tokens(
    model: GPT,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    device: torch.device,
) -> tuple[Tensor | None, int]:
    """End tokens as a tensor (None for none) and the padding token.

    Ids that a caller gives must be in the vocabulary. A config may name ids beyond it, as small models with GPT-2's
    defaults do: such an end token ends nothing, and such a padding token is refused where a row could need it.
    """
    size = model.config.vocab_size
    if eos_token_id is None:
        named = model.config.eos_token_id
        ids = [] if named is None else [named] if isinstance(named, int) else list(named)
        ends = [token for token in ids if token < size]
    elif is_integer(eos_token_id):
        ends = [_token_id("eos_token_id", eos_token_id, size)]
    else:
        given = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
        given = [given] if is_integer(given) else given  # a tensor without dimensions
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise TypeError(f"eos_token_id: got {eos_token_id!r}, needs a token id or a sequence of them")
        ends = [_token_id("eos_token_id", token, size) for token in given]
    if pad_token_id is not None:
        pad = _token_id("pad_token_id", pad_token_id, size)
    elif model.config.pad_token_id is not None and ends:
        pad = _token_id("pad_token_id of the config", model.config.pad_token_id, size)
    else:
        pad = ends[0] if ends else 0  # without an end token no row is finished early
    return (torch.tensor(ends, device=device) if ends else None), pad


def _token_id(name: str, token: object, size: int) -> int:
    if isinstance(token, Tensor) and token.dim() == 0:
        token = token.item()
    if not is_integer(token):
        raise TypeError(f"{name}: got {token!r}, needs a token id, an integer")
    number = int(token)  # type: ignore[call-overload]
    if not 0 <= number < size:
        raise ValueError(f"{name}: got {number}, needs 0 to {size - 1} (vocab_size - 1)")
    return int(number)


def _pad_left(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts with their padding moved to the left and the bool mask to match; no mask where there is no padding."""
    if attention_mask is None:
        return input_ids, None
    check_tensor("attention_mask", attention_mask)
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
    logits = logits.float()
    if temperature < COLD:
        logits, temperature = logits - logits.amax(-1, keepdim=True), max(temperature, 1e-30)
    logits = logits / float(temperature)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before already reach p
        beyond[:, 0] = False  # the likeliest stays, also where top_p is 0 in float32
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
