"""The protocols of measured code: a case describes a call, a workload holds its inputs, a step runs it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from report.schema import Result

Tensors = Mapping[str, Tensor]
Step = Callable[[], Tensors]
REFUSED = "cannot run this call"  # in the message of a named backend that does not support a call


class CannotRun(Exception):
    """A provider's reason for not taking part in a case."""


class Judgement(NamedTuple):
    """The reference of a step's tensors: the same part of each in float64, and how plain torch computes it."""

    part: Callable[[str, Tensor], Tensor]  # the slice of a step's tensor that was judged
    golden: Tensors  # float64
    plain: Callable[[], Tensors]  # the formula in the case's dtype, scores and weights materialised
    over: str  # which part, in words


class Workload(Protocol):
    """One case's inputs, allocated on one device."""

    def step(self, provider: str) -> Step:
        """The provider's call on these inputs; CannotRun (or any error) becomes the row's reason."""
        ...

    def judge(self, provider: str) -> Judgement | None:
        """The expected results for this provider; None if there are none to compare with."""
        ...


class Case(Protocol):
    """The description of a measured call, before anything is allocated."""

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def params(self) -> Result: ...
    @property
    def direction(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def label(self) -> str:
        """The case in words, as tables show it."""
        ...

    @property
    def axis(self) -> Result | None:
        """The case's point in a chart over size: {"name": of the axis, "value": on it, "line": which curve}."""
        ...

    @property
    def flops(self) -> float | None:
        """Operations of one call, from permitted pairs; None where memory bounds the call."""
        ...

    @property
    def bytes(self) -> float | None:
        """Bytes that every implementation must read and write; None where arithmetic bounds the call."""
        ...

    @property
    def target(self) -> Result | None:
        """{"provider", "against", "speed": least ratio, "time", "memory": greatest ratios}, or None."""
        ...

    def providers(self, device: torch.device) -> Sequence[str]: ...
    def open(self, device: torch.device) -> Workload: ...
    def small(self) -> Case:
        """The same case at a small size, run once before memory is measured."""
        ...
