"""Names of transformers beyond its documented interface: each looked up in one place, on use, with a fallback."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

OLDEST = (5, 23)


def check_version() -> None:
    """ImportError if the installed transformers is older than the mask interface that this package uses."""
    got = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if got < OLDEST:
        needs = ".".join(map(str, OLDEST))
        raise ImportError(
            f"fastattn.integrations.transformers: got transformers {transformers.__version__}, needs {needs} or newer"
        )


def version() -> str:
    """The installed transformers."""
    return str(transformers.__version__)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"transformers.{name}")
    except ImportError:
        return None


_masking_utils = _module("masking_utils")
_import_utils = _module("utils.import_utils")
_output_capturing = _module("utils.output_capturing")


def masking(name: str) -> Any:
    """A function of transformers.masking_utils, None where this version does not have it."""
    return getattr(_masking_utils, name, None)


def interfaces() -> tuple[Any, Any]:
    """(AttentionInterface, AttentionMaskInterface), whose `register` takes a name and a function."""
    found = tuple(getattr(transformers, n, None) for n in ("AttentionInterface", "AttentionMaskInterface"))
    if not all(hasattr(interface, "register") for interface in found):
        raise ImportError(
            f"fastattn.integrations.transformers: got transformers {transformers.__version__}, which has no "
            "AttentionInterface and AttentionMaskInterface to register with"
        )
    return cast("tuple[Any, Any]", found)


def dense_bool_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of "sdpa": (B, 1, Sq, Sk) bool, True = attend, or None; built here if transformers cannot."""
    mask_function = mask_function or _causal
    if (function := masking("sdpa_mask")) is not None:
        return cast(
            "Tensor | None",
            function(
                batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, device=device,
                **kwargs,
            ),
        )  # fmt: skip
    keys = torch.arange(kv_length, device=device) + kv_offset
    places = (
        torch.arange(batch_size, device=device), torch.zeros(1, dtype=torch.int64, device=device),
        torch.arange(q_length, device=device) + q_offset, keys,
    )  # fmt: skip
    if kwargs.get("use_vmap"):
        for axis in (3, 2, 1, 0):
            mask_function = torch.vmap(mask_function, tuple(0 if i == axis else None for i in range(4)))
        mask = mask_function(*places)
    else:
        mask = mask_function(*(x.view([-1 if i == j else 1 for j in range(4)]) for i, x in enumerate(places)))
    mask = mask.expand(batch_size, 1, q_length, kv_length)
    if attention_mask is not None:
        mask = mask & padding_of(attention_mask, kv_length, kv_offset)[:, None, None]
    return cast(Tensor, mask)


def dense_float_mask(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask of eager attention: 0 or the dtype's lowest number, or None where nothing is hidden."""
    if (function := masking("eager_mask")) is not None:
        return cast("Tensor | None", function(dtype=dtype, **kwargs))
    mask = dense_bool_mask(**kwargs | {"allow_is_causal_skip": False})
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(dtype).min
    )  # fmt: skip


def padding_of(attention_mask: Tensor, kv_length: int, kv_offset: int | Tensor) -> Tensor:
    """(B, Sk) bool: which of the keys from kv_offset on are tokens; keys beyond the mask are not."""
    missing: Any = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)


def _causal(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def is_tracing(tensor: Tensor) -> bool:
    """Whether a tensor's values cannot be read: the code is being compiled, exported or captured."""
    if (function := getattr(_import_utils, "is_tracing", None)) is not None:
        return bool(function(tensor))
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta  # type: ignore[attr-defined]


def outputs_collected() -> Any:
    """The outputs that the running forward collects, by name; None if it collects none or that cannot be known."""
    collector = getattr(_output_capturing, "_active_collector", None)
    if collector is None:
        return None
    if torch.compiler.is_compiling():  # Dynamo cannot read a context variable
        return getattr(collector, "global_var", None)
    return collector.get() if hasattr(collector, "get") else None


def model_classes(config_class: type) -> list[type[Any]]:
    """The model classes of a config's class, in the modeling files beside it that are loaded."""
    beside = config_class.__module__.rpartition(".")[0]
    return [
        cls
        for name, module in list(sys.modules.items())
        if name == config_class.__module__ or (beside and name.startswith(f"{beside}.modeling"))
        for cls in list(vars(module).values())
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.__module__ == name
        if getattr(cls, "config_class", None) is config_class
    ]


def is_model(module: object) -> bool:
    """Whether a module is a transformers model, which has a config."""
    return isinstance(module, transformers.PreTrainedModel)


def is_model_class(cls: type) -> bool:
    """Whether a class is a transformers model class."""
    return issubclass(cls, transformers.PreTrainedModel)


def implementation(config: Any) -> str | None:
    """The attention implementation that a config names for its own modules."""
    return cast("str | None", getattr(config, "_attn_implementation", None))


def set_implementation(config: Any, name: str | None) -> None:
    """Set a config's attention implementation, and leave the configs inside it unchanged."""
    if hasattr(config, "_attn_implementation_internal"):
        config._attn_implementation_internal = name
        return
    inside = [config]
    for outer in inside:
        inside += sub_configs(outer)
    before = [implementation(inner) for inner in inside]
    for inner, old in zip(inside, [name, *before[1:]]):  # each sets those inside it, which follow in the list
        inner._attn_implementation = old


def sub_configs(config: Any) -> Iterator[Any]:
    """The configs directly inside a config."""
    for key in getattr(config, "sub_configs", None) or ():
        if (sub := getattr(config, key, None)) is not None:
            yield sub


def can_choose(model: nn.Module) -> bool:
    """Whether transformers lets the attention of a model's class be chosen after it was made."""
    test = getattr(model, "_can_set_attn_implementation", None)
    return bool(test()) if callable(test) else True


def runs_sdpa(model: nn.Module | type) -> bool:
    """Whether transformers lets a model's class run on "sdpa", whose masks leave out what is_causal implies."""
    return bool(getattr(model, "_supports_sdpa", True))
