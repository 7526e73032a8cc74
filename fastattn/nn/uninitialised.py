"""Modules constructed without drawing their weights."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

_DRAWING = {  # methods of tensors and functions of torch.nn.init that fill their first argument
    *("normal_", "uniform_", "trunc_normal_", "xavier_normal_", "xavier_uniform_"),
    *("kaiming_normal_", "kaiming_uniform_", "orthogonal_"),
}


class Uninitialised(TorchFunctionMode):
    """Leaves tensors as they are where a constructor would draw them: for models that are filled afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWING and (args or "tensor" in kwargs):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
