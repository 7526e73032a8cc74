"""Which tokens end a row, and what stands behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.generation.protocol import CausalLM
from fastattn.ops.arguments import is_integer


def special_tokens(
    model: CausalLM,
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
