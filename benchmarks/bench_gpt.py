"""GPT-2 small with random weights beside transformers' GPT-2: tokens generated, training and evaluation steps.

python benchmarks/bench_gpt.py              every case, results stored
python benchmarks/bench_gpt.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import command
import harness
import schema
import torch
from harness import Judgement, Step
from torch import Tensor

SCRIPT = Path(__file__).resolve()
SMALL: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}


@dataclass(frozen=True)
class GPTCase:
    """One use of the model: what is done with a batch of token ids."""

    name: str
    group: str  # "generate", "train" or "evaluate"
    batch: int
    seqlen: int
    new_tokens: int = 0
    ragged: bool = False  # rows left-padded by 0, 1, 2, ... tokens
    preset: str = "gpt2"
    dtype: torch.dtype = torch.float32

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "group", "dtype") and v}

    @property
    def direction(self) -> str:
        """What a step runs."""
        return "forward+backward" if self.group == "train" else "forward"

    @property
    def flops(self) -> float | None:
        """Not counted: the models differ in none, and generating is bound by memory."""
        return None

    @property
    def target(self) -> schema.Result | None:
        """None: the figures are to be seen, not to be met."""
        return None

    def contestants(self, device: torch.device) -> list[str]:
        """Ours first; transformers with its default attention, torch's fused one, and its eager one."""
        return ["fastattn", "transformers-sdpa", "transformers-eager"]

    def open(self, device: torch.device) -> GPTWorkload:
        """A model with random weights and random tokens on the device."""
        return GPTWorkload(self, device)

    def small(self) -> GPTCase:
        """The same use of a tiny model."""
        return replace(self, preset="", seqlen=min(self.seqlen, 24), new_tokens=min(self.new_tokens, 4))


class GPTWorkload:
    """One set of weights in both libraries' models, and the tokens."""

    def __init__(self, case: GPTCase, device: torch.device) -> None:
        from fastattn.models import GPT, GPTConfig

        self.case, self.device = case, device
        torch.manual_seed(7)
        self.config = GPTConfig.preset(case.preset) if case.preset else GPTConfig(**SMALL)
        self.config.eos_token_id = self.config.bos_token_id = None
        self.model = GPT(self.config).to(device, case.dtype)
        self.tokens = torch.randint(self.config.vocab_size, (case.batch, case.seqlen), device=device)
        self.mask = torch.ones_like(self.tokens)
        if case.ragged:
            for row in range(case.batch):
                self.mask[row, : row % case.seqlen] = 0

    def step(self, contestant: str) -> Step:
        """One generation, or one loss with or without its gradients."""
        model = self.model if contestant == "fastattn" else self._transformers(contestant, self.case.dtype)
        model.train(self.case.group == "train")
        return {"generate": self._generate, "train": self._train, "evaluate": self._evaluate}[
            self.case.group
        ](model)

    def judge(self, contestant: str) -> Judgement | None:
        """The loss in float64; a generation's tokens are compared by the tests."""
        return None if self.case.group == "generate" else self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        losses = {}
        for dtype in (torch.float64, self.case.dtype):
            model = self._transformers("transformers-eager", dtype).eval()
            # transformers computes the loss itself in float32
            with torch.no_grad():
                logits = model(self.tokens).logits[:, :-1].flatten(0, 1)
                losses[dtype] = torch.nn.functional.cross_entropy(logits, self.tokens[:, 1:].flatten())
        golden, plain = ({"loss": losses[dtype]} for dtype in (torch.float64, self.case.dtype))
        return Judgement(lambda name, tensor: tensor, golden, plain, "the loss")

    def _generate(self, model: Any) -> Step:
        options = {"max_new_tokens": self.case.new_tokens, "attention_mask": self.mask}

        def step() -> dict[str, Tensor]:
            return {"ids": model.generate(self.tokens, **options)}

        assert step()["ids"].shape[1] == self.case.seqlen + self.case.new_tokens
        return step

    def _train(self, model: Any) -> Step:
        def step() -> dict[str, Tensor]:
            model.zero_grad(set_to_none=True)
            loss = model(self.tokens, labels=self.tokens).loss
            loss.backward()
            return {"loss": loss.detach()}

        return step

    def _evaluate(self, model: Any) -> Step:
        def step() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"loss": model(self.tokens, labels=self.tokens).loss}

        return step

    def _transformers(self, contestant: str, dtype: torch.dtype) -> Any:
        """transformers' GPT-2 with the same weights."""
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise harness.CannotRun(f"not installed: {error}") from None
        from fastattn.models.checkpoint import to_gpt2_names

        names = (
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "embd_pdrop",
            "resid_pdrop",
            "attn_pdrop",
        )
        sizes = {name: getattr(self.config, name) for name in names}
        config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        attention = contestant.removeprefix("transformers-")
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
        model.load_state_dict(to_gpt2_names(self.model.state_dict(), tied=True), strict=False)
        return model.to(self.device, dtype)


def cases_for(device: torch.device) -> list[GPTCase]:
    """Every case; sizes a CPU finishes in seconds."""
    return [
        GPTCase("generate-1x32", "generate", 1, 32, new_tokens=64),
        GPTCase("generate-4x32", "generate", 4, 32, new_tokens=32),
        GPTCase("generate-4x32-ragged", "generate", 4, 32, new_tokens=32, ragged=True),
        GPTCase("train-1x512", "train", 1, 512),
        GPTCase("evaluate-1x512", "evaluate", 1, 512),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("gpt", SCRIPT, cases_for, None, argv)


if __name__ == "__main__":
    sys.exit(main())
