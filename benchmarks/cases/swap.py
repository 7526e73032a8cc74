"""Models before and after `fastattn.swap_attention`: the effect of adding that one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from inputs import swap_models
from measure.harness import Budget
from measure.protocols import CannotRun, Judgement, Step, Tensors
from report import figures, schema

BUDGET = Budget(seconds=6.0, least_rounds=15, most_rounds=60, memory=False)
BEFORE = "as it was"


@dataclass(frozen=True)
class SwapCase:
    """One model and one use of it; `length` is tokens, or pixels of an image's side."""

    name: str
    group: str
    make: Callable[..., swap_models.Made] = field(repr=False)
    batch: int
    length: int
    direction: str = "forward"
    tiny: bool = False
    dtype: torch.dtype = torch.float32

    flops = bytes = axis = None

    @property
    def target(self) -> schema.Result | None:
        """No model should be slower after a swap, except for the noise of a measurement."""
        return None if self.tiny else {"provider": "fastattn", "against": BEFORE, "speed": 0.97}

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return {"batch": self.batch, "length": self.length}

    @property
    def label(self) -> str:
        """The case in words."""
        words = f"{self.group}, {self.batch}×{self.length}"  # noqa: RUF001
        return ", ".join([words, *figures.unusual(self.dtype, self.direction)])

    def providers(self, device: torch.device) -> list[str]:
        """The model with attention swapped, and as it was."""
        return ["fastattn", BEFORE]

    def open(self, device: torch.device) -> SwapWorkload:
        """The model and its inputs."""
        return SwapWorkload(self, device)

    def small(self) -> SwapCase:
        """The same use of a tiny model."""
        return replace(self, batch=min(self.batch, 2), length=min(self.length, 24), tiny=True)


class SwapWorkload:
    """A model with random weights, and a copy of it with attention swapped."""

    def __init__(self, case: SwapCase, device: torch.device) -> None:
        self.case = case
        torch.manual_seed(7)
        try:
            with torch.device(device):
                self.model, self.inputs, self.call = case.make(case.batch, case.length, case.tiny)
        except ModuleNotFoundError as error:
            self.missing: str | None = f"not installed: {error}"
        except ImportError as error:
            self.missing = str(error)
        else:
            self.missing = None

    def step(self, provider: str) -> Step:
        """One call; with its backward where the case asks for it."""
        import fastattn

        if self.missing:
            raise CannotRun(self.missing)
        model = self.model
        if provider == "fastattn":
            model = copy.deepcopy(model)
            report = fastattn.swap_attention(model)
            if not report.swapped:
                raise CannotRun(f"nothing to swap: {report}")
        return partial(self._run, model, self.inputs)

    def judge(self, provider: str) -> Judgement | None:
        """The model as it was, in float64; None for generated ids, whose ties of logits differ by rounding."""
        if self.missing or self.case.group.startswith("Llama"):
            return None
        plain = partial(self._run, self.model, self.inputs)
        doubled = {n: t.double() if t.is_floating_point() else t for n, t in self.inputs.items()}
        golden = self._run(copy.deepcopy(self.model).double(), doubled)
        return Judgement(lambda name, tensor: tensor, golden, plain, "all of the output")

    def _run(self, model: nn.Module, inputs: swap_models.Inputs) -> Tensors:
        if self.case.direction == "forward":
            with torch.no_grad():
                return {"out": self.call(model, inputs)}
        model.zero_grad()
        out = self.call(model, inputs)
        out.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return {"out": out.detach(), "grad": gradients[0]}


def cases_for(device: torch.device) -> list[SwapCase]:
    """Every case of a device, the most important first."""
    scale = 1 if device.type == "cpu" else 8
    train: dict[str, Any] = {"direction": "forward+backward"}
    encoder, llama = swap_models.torch_encoder, swap_models.llama
    return [
        SwapCase("bert", "BERT, padded", swap_models.bert, 8 * scale, 128),
        SwapCase("llama-generate", "Llama, 16 new tokens", partial(llama, padded=False), 1, 64),
        SwapCase("llama-generate-ragged", "Llama, 16 new tokens, padded", partial(llama, padded=True), 4, 64),
        SwapCase("encoder", "torch.nn.TransformerEncoder", encoder, 8 * scale, 128),
        SwapCase(
            "encoder-padded",
            "torch.nn.TransformerEncoder, padded",
            partial(encoder, padded=True),
            8 * scale,
            128,
        ),
        SwapCase("encoder-train", "torch.nn.TransformerEncoder", encoder, 4 * scale, 128, **train),
        SwapCase(
            "cross-attention", "torch.nn.MultiheadAttention to 1024 keys", swap_models.cross_attention, 4, 64
        ),
        SwapCase("timm-vit", "timm ViT-S/16", swap_models.timm_vit, 4 * scale, 224),
        SwapCase("timm-vit-train", "timm ViT-S/16", swap_models.timm_vit, 2 * scale, 224, **train),
        SwapCase("open-clip", "open_clip ViT-B-32", swap_models.open_clip, 4 * scale, 16),
    ]
