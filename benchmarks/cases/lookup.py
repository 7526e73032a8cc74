"""Prompt lookup beside generation without it, on the text that a model was trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from measure.protocols import Judgement, Step, Tensors
from peers.trained import trained, untrained
from report import figures, schema

LOOKUP, WITHOUT = "fastattn-lookup", "fastattn"
TOKENS = 10  # most tokens guessed in a step


@dataclass(frozen=True)
class LookupCase:
    """`new_tokens` tokens after each of `count` prompts of the model's training text, one prompt at a time."""

    name: str
    text: str  # "code" or "prose"; "" is random ids
    quantized: str | None = None
    do_sample: bool = False
    prompt: int = (
        896  # with the new tokens nearly all of the model's 1,024 positions, as in completing a file
    )
    new_tokens: int = 112
    count: int = 4
    group: str = "lookup"
    target: schema.Result | None = None
    found: dict[str, float] = field(
        default_factory=dict, compare=False
    )  # by the workload, of its last generation

    dtype = torch.float32
    direction = "forward"
    flops = bytes = axis = None

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        sizes = figures.sizes(self, "text", "quantized", "do_sample", "prompt", "new_tokens", "count")
        return {**sizes, **self.found}

    @property
    def label(self) -> str:
        """The case in words."""
        words = f"prompt lookup on {self.text or 'random ids'}, {self.new_tokens} tokens after {self.prompt}"
        words += ", sampled" if self.do_sample else ""
        words += ", 8-bit weights" if self.quantized else ""
        if self.found:
            words += ", {right:.0%} of {guessed:.2f} guesses a token right, {tokens_per_step:.2f} tokens a step".format(
                **self.found
            )
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
            "max_new_tokens": self.case.new_tokens, "eos_token_id": [], "do_sample": self.case.do_sample,
            "temperature": 0.8 if self.case.do_sample else None, "seed": 0,
            "prompt_lookup_num_tokens": TOKENS if provider == LOOKUP else None,
        }  # fmt: skip

        def step() -> Tensors:
            with torch.no_grad():
                return {
                    "ids": torch.cat([self.model.generate(row, **options) for row in self.prompts.split(1)])
                }

        if provider == LOOKUP:
            step()  # has made the kernels
            self._count(step)
        return step

    def _count(self, step: Step) -> None:
        """Run a step and note how many guesses were right."""
        made: list[_Counted] = []
        original = self.model.decoder

        def counted(*args: Any, **options: Any) -> _Counted:
            made.append(_Counted(original(*args, **options)))
            return made[-1]

        self.model.decoder = counted
        try:
            step()
        finally:
            del self.model.decoder
        steps, guessed = sum(each.steps for each in made), sum(each.guessed for each in made)
        tokens = len(made) * (self.case.new_tokens - 1)  # the prompt gives the first one
        self.case.found.update(
            guessed=round(guessed / tokens, 4),
            right=round((tokens - steps) / max(guessed, 1), 4),
            tokens_per_step=round(tokens / steps, 4),
        )

    def judge(self, provider: str) -> Judgement | None:
        """None: tests compare the ids of the small form."""
        return None


class _Counted:
    """A decoder that counts its steps and the tokens guessed in them."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.steps = self.guessed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        logits: torch.Tensor = self._decoder.step(tokens)
        return logits

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.guessed += tokens.shape[1] - 1
        logits: torch.Tensor = self._decoder.extend(tokens)
        return logits
