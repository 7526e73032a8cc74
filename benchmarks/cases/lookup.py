"""Prompt lookup beside generating without it, on the text of a model that was trained here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from measure.protocols import Judgement, Step, Tensors
from peers.trained import trained, untrained
from report import figures, schema

LOOKUP, WITHOUT = "fastattn-lookup", "fastattn"
TOKENS = 10  # guessed at most


@dataclass(frozen=True)
class LookupCase:
    """`new_tokens` sampled tokens behind each of `count` prompts of held-out text, one prompt at a time."""

    name: str
    text: str  # "code" or "prose"; "" is random ids
    quantized: str | None = None
    prompt: int = 160
    new_tokens: int = 96
    count: int = 2
    group: str = "lookup"
    target: schema.Result | None = None

    dtype = torch.float32
    direction = "forward"
    flops = bytes = axis = None

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return figures.sizes(self, "text", "quantized", "prompt", "new_tokens", "count")

    @property
    def label(self) -> str:
        """The case in words."""
        words = f"prompt lookup on {self.text or 'random ids'}, {self.new_tokens} tokens after {self.prompt}"
        words += ", 8-bit weights" if self.quantized else ""
        return ", ".join([words, *figures.unusual(self.dtype, "forward+backward")])

    def providers(self, device: torch.device) -> list[str]:
        """With it and without."""
        return [LOOKUP, WITHOUT]

    def open(self, device: torch.device) -> LookupWorkload:
        """The trained model and its prompts."""
        return LookupWorkload(self, device)

    def small(self) -> LookupCase:
        """The same use of a tiny model with random weights."""
        return replace(self, text="", prompt=32, new_tokens=12, target=None)


class LookupWorkload:
    """One model and its prompts."""

    def __init__(self, case: LookupCase, device: torch.device) -> None:
        self.case = case
        model, rows = trained(case.text, case.count) if case.text else untrained(case.count)
        self.model = copy.deepcopy(model).to(device)
        if case.quantized:
            self.model.quantize(case.quantized)
        self.prompts = rows[:, : case.prompt].to(device)

    def step(self, provider: str) -> Step:
        """One generation for each prompt; the ids of all."""
        options: dict[str, Any] = {
            "max_new_tokens": self.case.new_tokens, "eos_token_id": [], "do_sample": True, "temperature": 0.8,
            "seed": 0, "prompt_lookup_num_tokens": TOKENS if provider == LOOKUP else None,
        }  # fmt: skip

        def step() -> Tensors:
            with torch.no_grad():
                return {
                    "ids": torch.cat([self.model.generate(row, **options) for row in self.prompts.split(1)])
                }

        return step

    def judge(self, provider: str) -> Judgement | None:
        """None: tests compare the ids of the small form."""
        return None
