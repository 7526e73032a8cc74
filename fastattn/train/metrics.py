"""Metrics of training: targets, perplexity, floating-point work and how much of the device's peak it uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn.constants import IGNORE_INDEX

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
    """Mean loss per target (nats) over a data set."""

    loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """exp(loss), inf where that passes the largest float."""
    return math.exp(loss) if not loss > MAX_EXPONENT else math.inf


def count_targets(labels: Tensor, *, shifted: bool) -> int:
    """Labels that count in the loss: those not IGNORE_INDEX, without each row's first when the model shifts them."""
    if shifted and labels.dim() > 1:
        labels = labels[:, 1:]
    if labels.is_floating_point():
        return labels.shape[0]
    return int((labels != IGNORE_INDEX).sum())


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens a model reads: those the attention mask lets through, else all input ids, else the labels."""
    if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
        return int(batch["attention_mask"].sum())
    return batch.get("input_ids", batch["labels"]).numel()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of half-precision matrix products on a device whose data sheet is known, else None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)


def training_flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of the batch, forward and backward, counted by torch; gradients stay as they are."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = [t.device for t in batch.values() if t.device.type == "cuda"][:1]
    for parameter, _ in held:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices), FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        return counter.get_total_flops()
    finally:
        for parameter, grad in held:
            parameter.grad = grad


def figures_of(
    window: Mapping[str, float], peak: float | None, flops_per_token: float | None
) -> dict[str, float]:
    """What the log says of some steps: mean loss, the last rate and norm, tokens/s, and the share of the peak used.

    Args:
        window: sums over the steps of "steps", "loss", "tokens" and "seconds"; the last "lr" and "grad_norm".
        peak: FLOP/s of all devices together; without it or `flops_per_token` there is no "mfu".
        flops_per_token: floating-point operations of a training step for a token.
    """
    tokens_per_second = window["tokens"] / max(window["seconds"], 1e-9)  # a coarse clock may stand still
    figures = {
        "loss": window["loss"] / window["steps"],
        "lr": window["lr"],
        "grad_norm": window["grad_norm"],
        "tokens_per_second": tokens_per_second,
    }
    if peak and flops_per_token:
        figures["mfu"] = tokens_per_second * flops_per_token / peak
    return figures
