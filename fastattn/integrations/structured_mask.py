"""A mask as structure: options of the kernel for fastattn, and a bool tensor for other code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastattn import visibility
from fastattn.ops.symbolic import map_leaves


class StructuredMask:
    """A (B, 1, Sq, Sk) mask, True = attend, as the equivalent options of `fastattn.attention`.

    Code that treats it as a tensor (indexing, tensor attributes, torch functions) works on
    `dense()`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device | str,
        causal: bool | str = False,
        window: tuple[int, int] | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.device = device
        self.causal = causal
        self.window = window
        self.segment_ids = segment_ids
        self.key_lengths = key_lengths
        self.key_mask = key_mask  # (B, Sk), the keys that any query may see

    def options(self, batch: int, seqlen_q: int) -> dict[str, Any]:
        """Options of `attention` for a batch of this size and this many queries, to which one row may be broadcast."""
        options: dict[str, Any] = {"causal": self.causal}
        if self.window is not None:
            options["window"] = self.window
        if self.segment_ids is not None:
            of_query, of_key = self.segment_ids
            options["segment_ids"] = (of_query.expand(batch, seqlen_q), of_key.expand(batch, -1))
        if self.key_lengths is not None:
            options["key_lengths"] = self.key_lengths.expand(batch)
        if self.key_mask is not None:
            options["mask"] = self.key_mask.expand(batch, -1)[:, None, None]
        return options

    def dense(self) -> Tensor:
        """The mask itself, bool."""
        batch, _, seqlen_q, seqlen_k = self.shape
        shift = 0 if self.causal == "top_left" else seqlen_k - seqlen_q
        seen = torch.ones(batch, seqlen_q, seqlen_k, dtype=torch.bool, device=self.device)
        distance = visibility.distances((0, seqlen_q), (0, seqlen_k), shift, seen.device)
        band = visibility.within_band(distance, bool(self.causal), *(self.window or (-1, -1)))
        if band is not None:
            seen = seen & band
        if self.segment_ids is not None:
            seen = seen & visibility.same_segment(*self.segment_ids)
        if self.key_lengths is not None:
            seen = seen & visibility.within_lengths(self.key_lengths, seqlen_k)[:, None, :]
        if self.key_mask is not None:
            seen = seen & self.key_mask[:, None, :]
        return seen[:, None]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Another device; another dtype makes it a tensor."""
        device, dtype = _device_and_dtype(*args, **kwargs)
        if dtype not in (None, torch.bool):
            return self.dense().to(*args, **kwargs)
        if device is None:
            return self

        def move(ids: Tensor | None) -> Tensor | None:
            return None if ids is None else ids.to(device)

        pair = self.segment_ids and (self.segment_ids[0].to(device), self.segment_ids[1].to(device))
        lengths, keys = move(self.key_lengths), move(self.key_mask)
        return StructuredMask(self.shape, device, self.causal, self.window, pair, lengths, keys)

    def contiguous(self) -> StructuredMask:
        """The mask itself, which has no memory layout."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def densify(leaf: Any) -> Any:
            return leaf.dense() if isinstance(leaf, StructuredMask) else leaf

        return func(*map_leaves(densify, args), **map_leaves(densify, kwargs or {}))

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __and__(self, other: Any) -> Tensor:
        return self.dense() & other

    def __or__(self, other: Any) -> Tensor:
        return self.dense() | other

    def __invert__(self) -> Tensor:
        return ~self.dense()

    __rand__ = __and__
    __ror__ = __or__


def _device_and_dtype(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and dtype that `Tensor.to`'s arguments name, None where unchanged."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in (*args, kwargs.get("tensor")):
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, int, torch.device)) and not isinstance(
            arg, bool
        ):  # bools: non_blocking, copy
            device = arg
    return (None if device is None else torch.device(device)), dtype
