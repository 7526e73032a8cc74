"""GPT-2 small with random weights beside transformers' GPT-2: tokens generated greedily with a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cases.lookup import LOOKUP, WITHOUT, LookupCase
from inputs.products import PRODUCTS, Product, products_step
from measure.harness import Budget
from measure.protocols import Judgement, Step, Tensors
from peers.gpt import GPTPair, product_weights
from report import figures, schema

BUDGET = Budget(seconds=8.0, memory=False)
INT8, INVARIANT = "fastattn-int8", "fastattn-batch-invariant"


@dataclass(frozen=True)
class GenerateCase:
    """`new_tokens` greedy tokens behind a batch of prompts."""

    name: str
    group: str  # "equal", "int8": 8-bit weights, or "ragged": rows left-padded by 0, 1, 2, ... tokens
    batch: int
    prompt: int
    new_tokens: int
    preset: str = "gpt2"
    dtype: torch.dtype = torch.float32
    target: schema.Result | None = None
    peers: tuple[str, ...] = ("transformers-sdpa",)
    ours: tuple[str, ...] = ("fastattn",)  # the ways in which ours generates

    direction = "forward"
    flops = None

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return figures.sizes(self, "batch", "prompt", "new_tokens", "preset")

    @property
    def label(self) -> str:
        """The case in words."""
        padded = {"ragged": ", left-padded", "int8": ", 8-bit weights"}.get(self.group, "")
        words = f"{self.preset}, {self.new_tokens} tokens after {self.batch}×{self.prompt}{padded}"  # noqa: RUF001
        return ", ".join([words, *figures.unusual(self.dtype, "forward+backward")])

    @property
    def axis(self) -> schema.Result | None:
        """None: the cases differ in more than a size."""
        return None

    @property
    def bytes(self) -> float | None:
        """The weights of the products, once per new token."""
        if not self.preset:
            return None
        from fastattn.models import GPT, GPTConfig

        with torch.device("meta"):
            weights = product_weights(GPT(GPTConfig.preset(self.preset)))
        return float(self.new_tokens * self.dtype.itemsize * sum(weight.numel() for weight in weights))

    def providers(self, device: torch.device) -> list[str]:
        """Ours first; the floor last."""
        return [*self.ours, *self.peers, PRODUCTS]

    def open(self, device: torch.device) -> GenerateWorkload:
        """Random weights and random prompts on the device."""
        return GenerateWorkload(self, device)

    def small(self) -> GenerateCase:
        """The same use of a tiny model."""
        prompt, new_tokens = min(self.prompt, 24), min(self.new_tokens, 4)
        return replace(self, preset="", prompt=prompt, new_tokens=new_tokens, target=None)


class GenerateWorkload:
    """One set of weights in both libraries' models, and the prompts."""

    def __init__(self, case: GenerateCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.pair = GPTPair(case.preset, device)
        size = (case.batch, case.prompt)
        self.tokens = torch.randint(self.pair.config.vocab_size, size, device=device)
        self.mask = torch.ones_like(self.tokens)
        if case.group == "ragged":
            for row in range(case.batch):
                self.mask[row, : row % case.prompt] = 0

    def step(self, provider: str) -> Step:
        """One generation; its ids are the prompt and the continuation."""
        if provider == PRODUCTS:
            return self._products()
        model = self.pair.make(provider, self.case.dtype).eval()
        options: dict[str, Any] = {"max_new_tokens": self.case.new_tokens, "attention_mask": self.mask}
        if provider.startswith("transformers"):
            options |= {"do_sample": False, "pad_token_id": 0}
        if provider == INVARIANT:
            options |= {"batch_invariant": True}
        if provider == INT8:
            model.quantize("int8")

        def step() -> Tensors:
            with torch.no_grad():
                return {"ids": model.generate(self.tokens, **options)}

        made = step()["ids"].shape[1]
        assert made == self.case.prompt + self.case.new_tokens, f"{made} tokens"
        return step

    def judge(self, provider: str) -> Judgement | None:
        """None: random weights make ties of logits, so that ids differ by rounding; tests compare them."""
        return None

    def _products(self) -> Step:
        weights = [weight.detach().to(self.case.dtype) for weight in product_weights(self.pair.model)]
        step = products_step(
            [Product(weight, self.case.batch) for weight in weights],
            "int8" if self.case.group == "int8" else None,
        )

        def tokens() -> Tensors:
            for _ in range(self.case.new_tokens):
                made = step()
            return made

        return tokens


def cases_for(device: torch.device) -> list[GenerateCase | LookupCase]:
    """Every case of a device, the most important first."""

    def faster(speed: float, provider: str = "fastattn") -> schema.Result:
        return figures.target(speed, "transformers-sdpa", provider)

    def against_without(speed: float) -> schema.Result:
        return figures.target(speed, WITHOUT, LOOKUP)

    both: tuple[str, ...] = ("fastattn", INVARIANT)
    lookups = [
        LookupCase(
            "-".join(["lookup", text, *(["int8"] if kind else []), *(["sampled"] if sampled else [])]),
            text, kind, sampled, target=against_without(1.15 if text == "code" and kind else 0.97),
        )
        for text in ("code", "prose")
        for kind in ("int8", None)
        for sampled in (False, True)
    ]  # fmt: skip
    if device.type == "cpu":
        return [
            GenerateCase("1x32", "equal", 1, 32, 24, target=faster(1.6), ours=both),
            GenerateCase(
                "1x32-bf16", "equal", 1, 32, 24, dtype=torch.bfloat16, target=faster(2.0), ours=both
            ),
            GenerateCase("1x32-int8", "int8", 1, 32, 24, target=faster(3.5, INT8), ours=(INT8,)),
            GenerateCase("4x32-ragged", "ragged", 4, 32, 16, ours=(*both, INT8)),
            *lookups,
        ]
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "ours": both}
    return [
        GenerateCase("1x128", "equal", 1, 128, 128, **bf16),
        GenerateCase("32x128", "equal", 32, 128, 128, **bf16),
        GenerateCase("32x128-ragged", "ragged", 32, 128, 128, **bf16),
    ]
