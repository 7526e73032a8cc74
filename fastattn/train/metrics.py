"""Metrics of training: targets, perplexity, floating-point operations and their share of the device's peak."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn.constants import IGNORE_INDEX

LOSS = "loss"  # the name of the loss among the metrics of an evaluation
MAX_EXPONENT = 700.0  # exp of more overflows a float

# Dense bfloat16/float16 TFLOP/s of the vendor's data sheets; the first name contained in the device's name counts.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: mean per target over the data set, for a cross-entropy in nats.
        targets: the number of targets.
        figures: further metrics of the model by name, those of evaluate_with.
    """

    loss: float
    targets: int
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def value(self, name: str) -> float:
        """The loss, or the metric of that name.

        Raises:
            ValueError: there is no such metric.
        """
        if name == LOSS:
            return self.loss
        if name not in self.figures:
            known = ", ".join((LOSS, *self.figures))
            raise ValueError(f"best: got {name!r}, needs one of {known}")
        return self.figures[name]

    def __str__(self) -> str:
        figures = self.figures or {"perplexity": self.perplexity}
        return ", ".join([f"loss {self.loss:.4f}", *(f"{k} {v:.4g}" for k, v in figures.items())])


def perplexity(loss: float) -> float:
    """exp(loss), inf where that exceeds the largest float."""
    return math.exp(loss) if not loss > MAX_EXPONENT else math.inf


def count_targets(labels: Tensor, *, shifted: bool) -> int:
    """The number of labels that are not IGNORE_INDEX, without each row's first if the model shifts labels."""
    if shifted and labels.dim() > 1:
        labels = labels[:, 1:]
    if labels.is_floating_point():
        return labels.shape[0]
    return int((labels != IGNORE_INDEX).sum())


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens that a model reads: those of the attention mask, else all input ids, else the labels."""
    if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
        return int(batch["attention_mask"].sum())
    return batch.get("input_ids", batch["labels"]).numel()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of half-precision matrix products on a device whose data sheet is known, else None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)


def training_flops(model: nn.Module, loss: Callable[[], Tensor], batch: Mapping[str, Tensor]) -> int:
    """Floating-point operations of `loss()` for a batch, forward and backward, counted by torch; the model's gradients
    are unchanged."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = [t.device for t in batch.values() if t.device.type == "cuda"][:1]
    for parameter, _ in held:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices), FlopCounterMode(display=False) as counter:
            loss().backward()
        return counter.get_total_flops()
    finally:
        for parameter, grad in held:
            parameter.grad = grad


def figures_of(
    window: Mapping[str, float], peak: float | None, flops_per_token: float | None
) -> dict[str, float]:
    """The log's values for some steps: mean loss, the last rate and norm, tokens/s, and the share of the peak FLOP/s.

    Args:
        window: sums over the steps of "steps", "loss", "tokens" and "seconds"; the last "lr" and "grad_norm".
        peak: FLOP/s of all devices together; without it or `flops_per_token` there is no "mfu".
        flops_per_token: floating-point operations of a training step for a token.
    """
    tokens_per_second = window["tokens"] / max(window["seconds"], 1e-9)  # a coarse clock may give 0
    figures = {
        "loss": window["loss"] / window["steps"],
        "lr": window["lr"],
        "grad_norm": window["grad_norm"],
        "tokens_per_second": tokens_per_second,
    }
    if peak and flops_per_token:
        figures["mfu"] = tokens_per_second * flops_per_token / peak
    return figures


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
