"""Which transformers models need eager attention's dense masks, judged by what their classes do with a mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastattn.integrations import inspection
from fastattn.integrations import transformers_compat as compat

# Features that "sdpa" lacks and fastattn has; a model may refuse "sdpa" because of them.
_FEATURES = frozenset({"softcap", "s_aux"})


def why_dense(
    calling: Iterable[type[nn.Module]], others: Iterable[type[nn.Module]], models: Iterable[Any]
) -> tuple[Any, str] | None:
    """(class, reason) where masks must be complete dense tensors; None elsewhere.

    Args:
        calling: the classes whose attention goes through transformers' interface.
        others: other classes that may use a mask in another way.
        models: the models that contain them, or their classes.
    """
    calling = list(calling)
    for cls in others:
        if inspection.weighs_by_mask(cls):
            return cls, "reads the same masks in code of its own"
    for cls in calling:
        if inspection.tests_its_mask(cls):
            return cls, "changes its masks"
        if not inspection.says(cls, "is_causal"):
            return cls, "has no is_causal, by which attention without a mask is causal or not"
    if any(_FEATURES & inspection.passes(cls) for cls in calling):
        return None
    for model in models:
        if not compat.runs_sdpa(model):
            return model, "is not allowed sdpa by transformers, whose masks leave out implied causality"
    return None


def wants_eager_masks(config: Any) -> bool:
    """Whether the models of a config's class need eager attention's masks with any implementation."""
    return config is not None and _of_class(type(config))


@torch.compiler.assume_constant_result
def _of_class(config_class: type) -> bool:
    return _cached(config_class)


@inspection.remembered
def _cached(config_class: type) -> bool:
    models = compat.model_classes(config_class)
    found: set[type] = set()
    queue: list[type] = list(models)
    while queue:
        cls = queue.pop()
        if cls not in found and getattr(cls, "config_class", None) in (None, config_class):
            found.add(cls)
            queue += inspection.makes(cls)
    parts = sorted(found - set(models), key=lambda cls: cls.__qualname__)
    calling = [cls for cls in parts if inspection.calls_interface(cls)]
    others = [cls for cls in parts if cls not in calling and not compat.is_model_class(cls)]
    return why_dense(calling, others, models if calling else ()) is not None
