"""The adapters of `fastattn train`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from torch import nn

from fastattn.models.lora import attach
from fastattn.train.task_config import LoraConfig


def attach_adapters(model: nn.Module, task: ModuleType, lora: LoraConfig) -> None:
    """Attach adapters and freeze everything else, except new parts of the head and the task's own parts."""
    assert lora.r is not None
    targets: Any = lora.targets[0] if len(lora.targets) == 1 else lora.targets
    attach(model, lora.r, lora.alpha, targets, lora.dropout, rslora=lora.rslora)
    report = getattr(model, "load_report", None)
    new = set(report.new) if report is not None else set()
    for name, parameter in model.named_parameters():
        if name in new or any(fnmatchcase(name, pattern) for pattern in task.NEW_PARTS):
            parameter.requires_grad_(True)
