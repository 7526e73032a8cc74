"""transformers' GPT-2 with the same weights as ours, without a folder between them."""

from __future__ import annotations

from torch import Tensor

from fastattn.models.checkpoint.gpt2 import GPT2
from fastattn.models.checkpoint.names import join


def from_gpt2_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a GPT-2 whose head is tied, under our names."""
    plain = {GPT2.plain(name): tensor for name, tensor in tensors.items()}
    layers = sum(name.endswith(".ln_1.weight") for name in plain)
    state = {}
    for part in GPT2.parts:
        for i in range(layers if "{i}" in part.ours else 1):
            name = GPT2.plain(part.theirs[0]).replace("{i}", str(i))
            if name in plain:
                state[part.ours.replace("{i}", str(i))] = join([plain[name]], part)
    state["lm_head.weight"] = state["wte.weight"]
    return state
