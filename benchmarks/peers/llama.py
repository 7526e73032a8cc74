"""One set of random Llama weights in this project's model and in transformers'."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "num_kv_heads": 2, "n_inner": 128, "vocab_size": 500,
}  # fmt: skip


def save_llama(folder: Path, preset: str, **changes: Any) -> int:
    """Write a folder that both libraries read: random weights of a preset's sizes with `changes`, or of SMALL's.

    Returns the bytes of the weights.
    """
    from fastattn.models import GPT, GPTConfig

    torch.manual_seed(7)
    sizes = changes if preset else SMALL
    config = GPTConfig.preset(preset or "smollm-135m", **sizes, bos_token_id=1, eos_token_id=None)
    model = GPT(config)
    model.save_pretrained(folder)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


class LlamaPair:
    """The weights, and models made of them on demand."""

    def __init__(self, preset: str, **changes: Any) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name)
        save_llama(self.folder, preset, **changes)

    def make(self, provider: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A new model in evaluation mode with the shared weights: ours, or transformers' with SDPA."""
        if provider.startswith("fastattn"):
            from fastattn.models import GPT

            model: Any = GPT.from_pretrained(self.folder)
        else:
            from transformers import LlamaForCausalLM

            model = LlamaForCausalLM.from_pretrained(self.folder, attn_implementation="sdpa")
        return model.to(device, dtype).eval()
