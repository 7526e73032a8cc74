"""Type checks of the trainer's arguments, before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastattn.train.config import TrainConfig
from fastattn.train.metrics import LOSS


def check_arguments(
    model: Any,
    config: Any,
    train_data: Any,
    dev_data: Any,
    tokenizer: Any,
    collate: Any,
    on_record: Any,
    where: Any,
) -> None:
    """Raise TypeError for the first argument of the trainer that has a wrong type."""

    def items(data: Any) -> bool:
        return (
            hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes))
        )

    needs = {
        "model": (isinstance(model, nn.Module), model, "a torch.nn.Module"),
        "config": (isinstance(config, TrainConfig), config, "a TrainConfig"),
        "train_data": (items(train_data), train_data, "items by index, with a length"),
        "dev_data": (dev_data is None or items(dev_data), dev_data, "items by index, with a length, or None"),
        "tokenizer": (
            tokenizer is None or hasattr(tokenizer, "save_pretrained"),
            tokenizer,
            "a tokeniser with save_pretrained, or None",
        ),
        "collate": (callable(collate), collate, "a function of a list of items"),
        "on_record": (on_record is None or callable(on_record), on_record, "a function of a record, or None"),
        "where": (where is None or callable(where), where, "a function of an index, or None"),
    }
    for name, (good, value, need) in needs.items():
        if not good:
            raise TypeError(f"{name}: got {type(value).__name__}, needs {need}")


def check_inputs(inputs: Any) -> None:
    """Raise TypeError unless a checkpoint can hold the inputs: None, or a mapping in JSON's types."""
    try:
        good = inputs is None or isinstance(inputs, Mapping)
        json.dumps(inputs)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise TypeError(f"inputs: got {type(inputs).__name__}, needs a mapping in JSON's types, or None")


def check_evaluation(dev_data: Any, evaluate_with: Any, best: Any, show_with: Any) -> None:
    """Raise TypeError or ValueError for the first argument about evaluation that is wrong, or lacks another one."""
    for name, value in (("evaluate_with", evaluate_with), ("show_with", show_with)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}: got {type(value).__name__}, needs a function of the model, or None")
        if value is not None and dev_data is None:
            raise ValueError(f"{name}: is called at evaluations, needs dev_data")
    good = (
        isinstance(best, tuple) and len(best) == 2 and isinstance(best[0], str) and isinstance(best[1], bool)
    )
    if not good:
        raise TypeError(
            f"best: got {type(best).__name__}, needs a pair: a metric's name, and whether higher is better"
        )
    if best[0] != LOSS and evaluate_with is None:
        raise ValueError(f"best: got {best[0]!r}, needs evaluate_with, which returns that metric")
