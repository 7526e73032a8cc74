"""GPT-2 small with random weights beside transformers' GPT-2: training and evaluation steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cases.train_runs import run_cases
from measure.harness import Budget
from measure.protocols import Judgement, Step, Tensors
from peers.gpt import GPTPair, product_weights
from report import figures, schema

BUDGET = Budget(seconds=8.0)
IN_BACKWARD = "fastattn-in-backward"  # each parameter is updated once its gradient is complete


@dataclass(frozen=True)
class TrainCase:
    """A loss of a batch of token ids, with its gradients where it trains, and an AdamW step where it updates."""

    name: str
    group: str  # "train" or "evaluate"
    batch: int
    seqlen: int
    preset: str = "gpt2"
    dtype: torch.dtype = torch.float32  # others by autocast, weights stay in float32
    update: bool = False
    dropout: float = 0.0
    target: schema.Result | None = None
    peers: tuple[str, ...] = ("transformers-sdpa", "transformers-eager")

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return figures.sizes(self, "batch", "seqlen", "preset", "update", "dropout")

    @property
    def label(self) -> str:
        """The case in words."""
        what = {"train": "training step", "evaluate": "evaluation"}[self.group]
        parts = [f"{self.preset} {what}, {self.batch}×{self.seqlen} tokens"]  # noqa: RUF001
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += ["with AdamW"] if self.update else []
        return ", ".join([*parts, *figures.unusual(self.dtype, "forward+backward")])

    @property
    def axis(self) -> schema.Result | None:
        """Speed over the sequence length."""
        line = f"{self.group}, {self.batch * self.seqlen} tokens"
        return {"name": "sequence length", "value": self.seqlen, "line": line}

    @property
    def direction(self) -> str:
        """The passes that a step runs."""
        return "forward+backward" if self.group == "train" else "forward"

    @cached_property
    def flops(self) -> float | None:
        """2 per weight of a product and token, attention by permitted pairs; 3 and 3.5 times that with gradients."""
        if not self.preset:
            return None
        from fastattn.models import GPT, GPTConfig

        config = GPTConfig.preset(self.preset)
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in product_weights(GPT(config)))
        pairs = self.batch * self.seqlen * (self.seqlen + 1) // 2
        products, attention = 2.0 * weights * self.batch * self.seqlen, 4.0 * config.n_embd * pairs
        attention *= config.n_layer
        return 3 * products + 3.5 * attention if self.group == "train" else products + attention

    @property
    def bytes(self) -> float | None:
        """None: arithmetic bounds it."""
        return None

    def providers(self, device: torch.device) -> list[str]:
        """Ours first; providers that end in -compile run under torch.compile, and one updates in the backward pass."""
        in_backward = [IN_BACKWARD] if self.update and device.type == "cpu" else []
        return ["fastattn", *in_backward, *self.peers]

    def open(self, device: torch.device) -> TrainWorkload:
        """Random weights and random tokens on the device."""
        return TrainWorkload(self, device)

    def small(self) -> TrainCase:
        """The same use of a tiny model."""
        return replace(self, preset="", batch=min(self.batch, 2), seqlen=min(self.seqlen, 24), target=None)


class TrainWorkload:
    """One set of weights in both libraries' models, and the tokens."""

    def __init__(self, case: TrainCase, device: torch.device) -> None:
        self.case, self.device, self.keeps_state = case, device, case.update
        rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), case.dropout)
        self.pair = GPTPair(case.preset, device, **rates)
        size = (case.batch, case.seqlen)
        self.tokens = torch.randint(self.pair.config.vocab_size, size, device=device)

    def step(self, provider: str) -> Step:
        """One loss with or without its gradients and the update, of a model of the provider's own."""
        model = self.pair.make(provider, torch.float32)
        trains = self.case.group == "train"
        model.train(trains)
        run = torch.compile(model) if provider.endswith("-compile") else model
        optimizer, in_backward = None, None
        if self.case.update:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        if optimizer is not None and provider == IN_BACKWARD:
            from fastattn.train.in_backward import UpdatesInBackward

            in_backward = UpdatesInBackward(model, optimizer)

        def step() -> dict[str, Tensor]:
            with self._precision(), torch.set_grad_enabled(trains):
                loss = run(self.tokens, labels=self.tokens).loss
            if trains:
                model.zero_grad(set_to_none=True)
                with nullcontext() if in_backward is None else in_backward.on():
                    loss.backward()
            if optimizer is not None and in_backward is None:
                optimizer.step()
            return {"loss": loss.detach()}

        return step

    def judge(self, provider: str) -> Judgement | None:
        """The first loss in float64 by transformers; None with dropout, where each library draws its own."""
        known = find_spec("transformers") is not None and not self.case.dropout
        return self._judgement if known else None

    @cached_property
    def _judgement(self) -> Judgement:
        golden = {"loss": self._loss(torch.float64)}

        def plain() -> Tensors:
            with self._precision():
                return {"loss": self._loss(torch.float32)}

        return Judgement(lambda name, tensor: tensor, golden, plain, "the first loss")

    @torch.no_grad()
    def _loss(self, dtype: torch.dtype) -> Tensor:
        """The loss by transformers' model on plain torch operations, one sequence at a time."""
        model = self.pair.make("transformers-eager", dtype).eval()
        losses = []
        for row in self.tokens:
            logits = model(row[None]).logits[0, :-1]  # transformers' own loss is in float32
            losses.append(F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), row[1:]))
        return torch.stack(losses).mean()

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.case.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)


def cases_for(device: torch.device) -> list[Any]:
    """Every case of a device, the most important first."""
    if device.type == "cpu":
        alone = ("transformers-sdpa",)

        def at_least(speed: float, memory: float | None = None, provider: str = "fastattn") -> schema.Result:
            return figures.target(speed, "transformers-sdpa", provider, memory=memory)

        steps = ((1, 0.8), (4, 0.5))  # batch, share of the peer's peak

        return [
            TrainCase("train-1x512", "train", 1, 512, target=at_least(1.15, 0.75), peers=alone),
            TrainCase(
                "train-1x512-bf16", "train", 1, 512, dtype=torch.bfloat16, target=at_least(1.15), peers=alone
            ),
            TrainCase("train-4x512", "train", 4, 512, target=at_least(1.15, 0.4), peers=alone),
            *(
                TrainCase(
                    f"step-{batch}x512",
                    "train",
                    batch,
                    512,
                    update=True,
                    target=at_least(1.15, memory, IN_BACKWARD),
                    peers=alone,
                )
                for batch, memory in steps
            ),
            TrainCase("train-1x256-dropout", "train", 1, 256, dropout=0.1, peers=alone),
            TrainCase("evaluate-1x512", "evaluate", 1, 512, peers=alone),
            *run_cases(),
        ]
    compiled = ("transformers-sdpa", "transformers-sdpa-compile", "transformers-eager", "fastattn-compile")
    faster = {"provider": "fastattn-compile", "against": "transformers-sdpa-compile", "speed": 1.3}
    shared: dict[str, Any] = {"dtype": torch.bfloat16, "update": True, "peers": compiled}
    return [
        TrainCase("train-16x1024", "train", 16, 1024, target=faster, **shared),
        TrainCase("train-16x1024-dropout", "train", 16, 1024, dropout=0.1, **shared),
        TrainCase("evaluate-16x1024", "evaluate", 16, 1024, dtype=torch.bfloat16, peers=compiled),
    ]
