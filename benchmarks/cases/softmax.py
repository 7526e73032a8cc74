"""Softmax of rows of every length beside torch's, eager and compiled, and other kernels where they are installed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module

import torch
from torch import Tensor

from measure import calls
from measure.harness import Budget
from measure.protocols import Judgement, Step
from report import figures, schema

BUDGET = Budget(seconds=3.0)
GPU_ELEMENTS = 2**29  # of the input: far more than caches hold
GPU_COLUMNS = (4096, 262144, 256, 512, 1024, 2048, 8192, 16384, 32768, 65536, 131072)
JUDGED_ROWS = 8


@dataclass(frozen=True)
class SoftmaxCase:
    """Softmax along the last dimension of `rows` rows."""

    name: str
    group: str  # "rows" or "causal": then the rows are the queries of squares
    rows: int
    columns: int
    dtype: torch.dtype = torch.float32
    direction: str = "forward+backward"
    target: schema.Result | None = None
    compiled: bool = True  # whether torch.compile is a provider

    @property
    def causal(self) -> bool:
        """Whether a row stops at its own position in its square."""
        return self.group == "causal"

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return {k: v for k, v in asdict(self).items() if k in ("rows", "columns")}

    @property
    def label(self) -> str:
        """The case in words."""
        parts = [f"softmax {self.rows}×{self.columns}"] + (["causal"] if self.causal else [])  # noqa: RUF001
        return ", ".join([*parts, *figures.unusual(self.dtype, self.direction)])

    @property
    def axis(self) -> schema.Result | None:
        """Speed over the row's length."""
        return {"name": "row length", "value": self.columns, "line": f"{self.group}, {self.direction}"}

    @property
    def flops(self) -> float | None:
        """None: memory bounds it."""
        return None

    @property
    def bytes(self) -> float:
        """Forward: x read, y written. Backward: y and dy read, dx written."""
        passes = {"forward": 2, "forward+backward": 5}[self.direction]
        return float(passes * self.rows * self.columns * self.dtype.itemsize)

    def providers(self, device: torch.device) -> list[str]:
        """Ours first."""
        compiled = ["torch-compile"] if self.compiled else []
        installed = ["liger", "quack"] if device.type == "cuda" else []
        ours = calls.our_backends() if device.type == "cuda" else ["fastattn"]
        return [*ours, "torch", *compiled, *([] if self.causal else installed)]

    def open(self, device: torch.device) -> SoftmaxWorkload:
        """Random inputs on the device."""
        return SoftmaxWorkload(self, device)

    def small(self) -> SoftmaxCase:
        """The same op on few and short rows."""
        columns = min(self.columns, 64)
        return replace(self, rows=columns if self.causal else 16, columns=columns, target=None)


class SoftmaxWorkload:
    """The input of one case, the same for every provider."""

    def __init__(self, case: SoftmaxCase, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(7)
        shape = (-1, case.columns, case.columns) if case.causal else (case.rows, case.columns)

        def normal() -> Tensor:
            made = torch.randn((case.rows, case.columns), generator=generator, device=device)
            return made.to(case.dtype).view(shape)

        self.inputs = calls.leaves_of({"dx": normal()}, case.direction)
        self.dout = normal()

    def step(self, provider: str) -> Step:
        """One forward, or one with its backward."""
        return calls.step_of(self._call(provider), self.inputs, self.dout, self.case.direction)

    def judge(self, provider: str) -> Judgement | None:
        """The expected results in float64 for the first rows, or the first square."""
        return self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        count = 1 if self.case.causal else JUDGED_ROWS
        return calls.judge_by(
            self._formula,
            {"dx": self.inputs["dx"][:count]},
            self.dout[:count],
            self.case.direction,
            self.case.dtype,
            lambda name, tensor: tensor[:count],
            "the first square" if self.case.causal else f"rows 0..{count - 1}",
        )

    def _call(self, provider: str) -> calls.Call:
        if provider.startswith("fastattn"):
            return self._ours(provider.partition("-")[2] or "auto")
        if provider == "torch-compile":
            compiled: calls.Call = torch.compile(self._formula, dynamic=False)
            return compiled
        if provider == "liger":
            call: calls.Call = import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction.apply
            return call
        if provider == "quack":
            return import_module("quack").softmax
        return self._formula

    def _ours(self, backend: str) -> calls.Call:
        import fastattn

        def call(x: Tensor) -> Tensor:
            return fastattn.softmax(x, causal=self.case.causal, backend=backend)

        calls.unless_refused(lambda: call(self.inputs["dx"]))
        return call

    @property
    def _formula(self) -> calls.Call:
        if not self.case.causal:
            return lambda x: x.softmax(-1)
        columns = self.case.columns
        above = torch.ones(columns, columns, dtype=torch.bool, device=self.device).triu(1)
        return lambda x: x.masked_fill(above, -torch.inf).softmax(-1)


def cases_for(device: torch.device) -> list[SoftmaxCase]:
    """Every case of a device, the most important first."""
    return cpu_cases() if device.type == "cpu" else gpu_cases()


def cpu_cases() -> list[SoftmaxCase]:
    """Softmaxes of attention's shapes, and of rows from short to very long."""
    near = {"provider": "fastattn", "against": "torch", "speed": 0.95, "memory": 1.05}
    cases = [
        SoftmaxCase("causal-512", "causal", 24 * 512, 512),
        SoftmaxCase("causal-bf16-512", "causal", 24 * 512, 512, dtype=torch.bfloat16),
    ]
    return cases + [
        SoftmaxCase(
            f"rows-{columns}",
            "rows",
            2**22 // columns,
            columns,
            target=near if columns >= 512 else None,
            compiled=columns == 512,
        )
        for columns in (512, 128, 4096, 32768, 262144)
    ]


def gpu_cases() -> list[SoftmaxCase]:
    """Rows of every length in bfloat16, both directions."""
    cases = []
    for direction in ("forward", "forward+backward"):
        for columns in GPU_COLUMNS:
            name = f"{direction}-{columns}"
            rows = GPU_ELEMENTS // columns
            cases.append(SoftmaxCase(name, "rows", rows, columns, torch.bfloat16, direction))
    square = {"dtype": torch.bfloat16, "rows": 64 * 2048, "columns": 2048}
    return [*cases, SoftmaxCase("causal-2048", "causal", **square)]  # type: ignore[arg-type]
