"""Draw tokens from logits: temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.arguments import is_integer, is_number

COLD = 1e-3  # below it, logits are shifted before they are divided by the temperature, which could overflow


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token per row, (B,), drawn from (B, V) logits.

    Args:
        logits: (B, V), any float dtype; worked on in float32.
        temperature, top_k, top_p: as `generate` takes them.
        generator: on the logits' device; None = torch's own.
    """
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


def check_sampling(do_sample: bool, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse options of `sample` that have the wrong type, are out of range, or shape a sampling that is off."""
    if not isinstance(do_sample, bool):
        raise TypeError(f"do_sample: got {do_sample!r}, needs True or False")
    if top_k is not None and not is_integer(top_k):
        raise TypeError(f"top_k: got {top_k!r}, needs an integer")
    for name, value in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if isinstance(value, bool) or not is_number(value):
            raise TypeError(f"{name}: got {value!r}, needs a number")
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


def check_generator(seed: int | None, generator: torch.Generator | None) -> None:
    """Refuse a seed or a generator of the wrong type or range, and both at once."""
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
