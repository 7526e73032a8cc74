"""Cross-entropy of logits, and of a linear layer that never writes them, beside torch's and Liger's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import calls
from measure.harness import Budget
from measure.protocols import Judgement, Step
from report import figures, schema

BUDGET = Budget(seconds=3.0)
IGNORED = 0.1  # share of the targets that are ignored, as padding would be


@dataclass(frozen=True)
class LossCase:
    """The mean loss of `rows` targets over `vocabulary` classes; a linear loss has inputs of `width` features."""

    name: str
    group: str  # "loss" or "linear-loss"
    rows: int
    vocabulary: int
    width: int = 0
    dtype: torch.dtype = torch.float32
    direction: str = "forward+backward"
    compiled: bool = True  # whether torch.compile is a provider
    target: schema.Result | None = field(
        default_factory=lambda: {"provider": "fastattn", "against": "torch", "speed": 1.0, "memory": 1.0}
    )

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        sizes = {"rows": self.rows, "vocabulary": self.vocabulary}
        return {**sizes, "width": self.width} if self.width else sizes

    @property
    def label(self) -> str:
        """The case in words."""
        sizes = [self.rows, self.width, self.vocabulary] if self.width else [self.rows, self.vocabulary]
        inner = "×".join(map(str, sizes))  # noqa: RUF001
        kind = "linear cross-entropy" if self.width else "cross-entropy"
        return ", ".join([f"{kind} {inner}", *figures.unusual(self.dtype, self.direction)])

    @property
    def axis(self) -> schema.Result | None:
        """Speed over the vocabulary."""
        return {"name": "vocabulary", "value": self.vocabulary, "line": self.group}

    @property
    def flops(self) -> float | None:
        """The products of a linear loss, three with its gradients."""
        if not self.width:
            return None
        return (1 if self.direction == "forward" else 3) * 2.0 * self.rows * self.vocabulary * self.width

    @property
    def bytes(self) -> float | None:
        """Bytes of a loss: logits are read, and read again to write their gradient."""
        if self.width:
            return None
        passes = 1 if self.direction == "forward" else 3
        return float(passes * self.rows * self.vocabulary * self.dtype.itemsize)

    def providers(self, device: torch.device) -> list[str]:
        """Ours first."""
        compiled = ["torch-compile"] if self.compiled else []
        return ["fastattn", "torch", *compiled, *(["liger"] if device.type == "cuda" else [])]

    def open(self, device: torch.device) -> LossWorkload:
        """Random inputs on the device."""
        return LossWorkload(self, device)

    def small(self) -> LossCase:
        """The same op on few rows and classes."""
        vocabulary, width = min(self.vocabulary, 97), min(self.width, 16)
        return replace(self, rows=16, vocabulary=vocabulary, width=width, target=None)


class LossWorkload:
    """The inputs of one case, the same for every provider."""

    def __init__(self, case: LossCase, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(case.dtype)

        if case.width:
            weight = normal(case.vocabulary, case.width).mul_(case.width**-0.5)
            tensors = {"dhidden": normal(case.rows, case.width), "dweight": weight}
        else:
            tensors = {"dlogits": normal(case.rows, case.vocabulary)}
        self.inputs = calls.leaves_of(tensors, case.direction)
        self.target = torch.randint(case.vocabulary, (case.rows,), generator=generator, device=device)
        self.target[: int(IGNORED * case.rows)] = -100

    def step(self, provider: str) -> Step:
        """One loss, or one with its gradients."""
        return calls.step_of(self._call(provider), self.inputs, None, self.case.direction)

    def judge(self, provider: str) -> Judgement | None:
        """The loss in float64, and the gradient of the features or of the last rows of logits."""
        return self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        kept = ("out", "dhidden") if self.case.width else ("out",)
        return calls.judge_by(
            self._formula,
            self.inputs,
            None,
            self.case.direction,
            self.case.dtype,
            lambda name, tensor: tensor,
            "the loss and the features' gradient" if self.case.width else "the loss",
            kept,
        )

    def _call(self, provider: str) -> calls.Call:
        target = self.target
        if provider == "fastattn":
            import fastattn

            if self.case.width:
                return lambda hidden, weight: fastattn.linear_cross_entropy(hidden, weight, target)
            return lambda logits: fastattn.cross_entropy(logits, target)
        if provider == "torch-compile":
            compiled: calls.Call = torch.compile(self._formula, dynamic=False)
            return compiled
        if provider == "liger":
            functions = import_module("liger_kernel.transformers.functional")
            if self.case.width:
                return lambda hidden, weight: functions.liger_fused_linear_cross_entropy(
                    hidden, weight, target
                )
            return lambda logits: functions.liger_cross_entropy(logits, target)
        return self._formula

    @property
    def _formula(self) -> calls.Call:
        target = self.target
        if self.case.width:
            return lambda hidden, weight: F.cross_entropy(hidden @ weight.T, target)
        return lambda logits: F.cross_entropy(logits, target)


def cases_for(device: torch.device) -> list[LossCase]:
    """Every case of a device, the most important first."""
    if device.type == "cpu":
        near_compiled = {"provider": "fastattn", "against": "torch-compile", "speed": 0.85, "memory": 1.0}
        return [
            LossCase("linear-loss-1024x32768", "linear-loss", 1024, 32768, width=256),
            LossCase("loss-512x50257", "loss", 512, 50257, target=near_compiled),
            LossCase("loss-512x8192", "loss", 512, 8192, compiled=False),
        ]
    cases = []
    for vocabulary in (50257, 128256, 151936):
        cases.append(LossCase(f"loss-8192x{vocabulary}", "loss", 8192, vocabulary, dtype=torch.bfloat16))
        name = f"linear-loss-8192x{vocabulary}"
        cases.append(LossCase(name, "linear-loss", 8192, vocabulary, width=2048, dtype=torch.bfloat16))
    return cases
