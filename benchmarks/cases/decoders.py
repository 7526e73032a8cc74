"""A Llama-style decoder that generates for a batch of prompts of unequal lengths, beside transformers' Llama."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from inputs.products import PRODUCTS, Product, products_step
from inputs.varlen import spread_lengths
from measure.protocols import Judgement, Step, Tensors
from peers.gpt import product_weights
from peers.llama import LlamaPair
from report import figures, schema

TRANSFORMERS = "transformers-sdpa"


@dataclass(frozen=True)
class DecoderCase:
    """`new_tokens` greedy tokens behind `batch` left-padded prompts of `shortest` to `longest` tokens."""

    name: str
    preset: str
    changes: dict[str, int] = field(default_factory=dict)  # to the preset's sizes
    batch: int = 16
    shortest: int = 8
    longest: int = 64
    new_tokens: int = 16
    group: str = "decoder"
    dtype: torch.dtype = torch.float32
    target: schema.Result | None = None

    direction = "forward"
    flops = axis = None

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        kept = figures.sizes(self, "preset", "batch", "shortest", "longest", "new_tokens")
        return {**kept, **self.changes}

    @property
    def label(self) -> str:
        """The case in words."""
        words = f"{self.preset or 'a small Llama'}, {self.new_tokens} tokens after {self.batch} left-padded prompts"
        words += f" of {self.shortest} to {self.longest} tokens"
        return ", ".join([words, *figures.unusual(self.dtype, "forward+backward")])

    @property
    def bytes(self) -> float | None:
        """The weights of the products, once per new token."""
        if not self.preset:
            return None
        from fastattn.models import GPT, GPTConfig

        with torch.device("meta"):
            weights = product_weights(GPT(GPTConfig.preset(self.preset, **self.changes)))
        return float(self.new_tokens * self.dtype.itemsize * sum(weight.numel() for weight in weights))

    def providers(self, device: torch.device) -> list[str]:
        """Ours first; the floor last."""
        return ["fastattn", TRANSFORMERS, PRODUCTS]

    def open(self, device: torch.device) -> DecoderWorkload:
        """Random weights and random prompts on the device."""
        return DecoderWorkload(self, device)

    def small(self) -> DecoderCase:
        """The same use of a tiny model."""
        return replace(self, preset="", changes={}, batch=5, longest=24, new_tokens=4, target=None)


class DecoderWorkload:
    """One set of weights in both libraries' models, and the prompts."""

    def __init__(self, case: DecoderCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.pair = LlamaPair(case.preset, **case.changes)
        generator = torch.Generator().manual_seed(2)
        lengths = spread_lengths(case.shortest, case.longest, case.batch, seed=1)
        self.mask = (torch.arange(case.longest) >= case.longest - lengths[:, None]).long().to(device)
        self.ids = torch.randint(3, 500, (case.batch, case.longest), generator=generator).to(device)
        self.ids *= self.mask
        self.tokens = int(lengths.sum())

    def step(self, provider: str) -> Step:
        """One generation; its ids are the prompts and the continuations."""
        if provider == PRODUCTS:
            return self._products()
        model = self.pair.make(provider, self.device, self.case.dtype)
        options: dict[str, Any] = {"attention_mask": self.mask, "max_new_tokens": self.case.new_tokens}
        if provider == TRANSFORMERS:
            options |= {"do_sample": False, "pad_token_id": 0}

        def step() -> Tensors:
            with torch.no_grad():
                return {"ids": model.generate(self.ids, **options)}

        made = step()["ids"].shape[1]
        assert made == self.case.longest + self.case.new_tokens, f"{made} tokens"
        return step

    def _products(self) -> Step:
        """Those of the prompts' tokens, of which the head reads the last ones, and then of one token a row."""
        case = self.case
        model = self.pair.make("fastattn", self.device, case.dtype)
        *blocks, head = [weight.detach() for weight in product_weights(model)]
        prompts = [*(Product(weight, self.tokens) for weight in blocks), Product(head, case.batch)]
        steps = [
            products_step(prompts),
            products_step([Product(weight, case.batch) for weight in (*blocks, head)]),
        ]

        def step() -> Tensors:
            made = steps[0]()
            for _ in range(case.new_tokens - 1):
                made = steps[1]()
            return made

        return step

    def judge(self, provider: str) -> Judgement | None:
        """None: random weights make ties of logits, so that ids differ by rounding; tests compare the small form."""
        return None
