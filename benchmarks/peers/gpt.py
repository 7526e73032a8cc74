"""One set of random GPT-2 weights in this project's model and in transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}
SHARED_SIZES = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "embd_pdrop", "resid_pdrop", "attn_pdrop",
)  # fmt: skip


def save_gpt2(folder: Path, preset: str) -> int:
    """Write a folder that both libraries read: random weights of a preset's sizes, or of SMALL's; its bytes."""
    from fastattn.models import GPT, GPTConfig

    torch.manual_seed(7)
    model = GPT(GPTConfig.preset(preset) if preset else GPTConfig(**SMALL))
    model.save_pretrained(folder)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


class GPTPair:
    """The weights, and models made of them on demand."""

    def __init__(self, preset: str, device: torch.device, **changes: Any) -> None:
        from fastattn.models import GPT, GPTConfig

        self.device = device
        torch.manual_seed(7)
        self.config = GPTConfig.preset(preset) if preset else GPTConfig(**SMALL)
        self.config.eos_token_id = self.config.bos_token_id = None
        for name, value in changes.items():
            setattr(self.config, name, value)
        self.model = GPT(self.config).to(device)

    def make(self, provider: str, dtype: torch.dtype) -> Any:
        """A new model with the shared weights: ours, or transformers' for "transformers-ATTENTION..."."""
        family, *rest = provider.split("-")
        if family == "fastattn":
            from fastattn.models import GPT

            model = GPT(self.config).to(self.device)
            model.load_state_dict(self.model.state_dict())
            model.tie_weights()
            return model.to(dtype)
        return self._transformers(rest[0], dtype)

    def _transformers(self, attention: str, dtype: torch.dtype) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        from fastattn.models.checkpoint.gpt2 import OWN
        from fastattn.models.checkpoint.names import to_file

        sizes = {name: getattr(self.config, name) for name in SHARED_SIZES}
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        config = GPT2Config(**sizes, **tokens, attn_implementation=attention)
        model = GPT2LMHeadModel(config)
        weights = {
            name: tensor for name, tensor in self.model.state_dict().items() if name != "lm_head.weight"
        }
        model.load_state_dict(
            to_file(weights, None, OWN), strict=False
        )  # the head is tied, and has no name there
        return model.to(self.device, dtype)


def product_weights(model: Any) -> list[torch.Tensor]:
    """The matrix of every product a token goes through: those of the blocks, and the head's."""
    return [p for p in model.h.parameters() if p.dim() == 2] + [model.lm_head.weight]
