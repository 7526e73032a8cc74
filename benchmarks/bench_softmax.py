"""Softmax, cross-entropy and that of a linear layer beside torch's, eager and compiled: time, error and peak memory.

python benchmarks/bench_softmax.py              every case of this machine's device, results stored
python benchmarks/bench_softmax.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import command
import schema
import torch
from harness import Judgement, Step, Tensors
from torch import Tensor

SCRIPT = Path(__file__).resolve()
GPU_ELEMENTS = 2**29  # of a softmax's input: far more than caches hold
GPU_COLUMNS = (4096, 262144, 256, 512, 1024, 2048, 8192, 16384, 32768, 65536, 131072)
JUDGED_ROWS = 8


@dataclass(frozen=True)
class RowCase:
    """One op on `rows` rows of `columns` entries; a linear loss makes them from `width` features."""

    name: str
    group: str  # "softmax", "loss" or "linear-loss"
    rows: int
    columns: int
    width: int = 0
    causal: bool = False  # rows are the queries of squares
    dtype: torch.dtype = torch.float32
    direction: str = "forward+backward"

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return {
            k: v for k, v in asdict(self).items() if k not in ("name", "group", "dtype", "direction") and v
        }

    @property
    def flops(self) -> float | None:
        """The products of a linear loss, three with its gradients; the rest is bound by memory."""
        if not self.width:
            return None
        return (1 if self.direction == "forward" else 3) * 2.0 * self.rows * self.columns * self.width

    @property
    def target(self) -> schema.Result | None:
        """Losses: no slower than torch and no more memory."""
        if self.group == "softmax":
            return None
        return {"contestant": "fastattn", "against": "torch", "speed": 1.0, "memory": 1.0}

    def contestants(self, device: torch.device) -> list[str]:
        """Ours first."""
        return ["fastattn", "torch"] + (["torch-compile"] if device.type == "cuda" else [])

    def open(self, device: torch.device) -> RowWorkload:
        """Random inputs on the device."""
        return RowWorkload(self, device)

    def small(self) -> RowCase:
        """The same op on few and short rows."""
        columns = min(self.columns, 64)
        return replace(self, rows=columns if self.causal else 16, columns=columns, width=min(self.width, 16))


class RowWorkload:
    """The inputs of one case, the same for every contestant."""

    def __init__(self, case: RowCase, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(case.dtype)

        if case.width:
            self.inputs = {
                "dhidden": normal(case.rows, case.width),
                "dweight": normal(case.columns, case.width).mul_(case.width**-0.5),
            }
        else:
            squares = (-1, case.columns, case.columns) if case.causal else (case.rows, case.columns)
            self.inputs = {"dx": normal(case.rows, case.columns).view(squares)}
            self.dout = normal(case.rows, case.columns).view(squares)
        for tensor in self.inputs.values():
            tensor.requires_grad_(case.direction != "forward")
        self.target = torch.randint(case.columns, (case.rows,), generator=generator, device=device)

    def step(self, contestant: str) -> Step:
        """One forward, or one with its backward."""
        call = self._call(contestant == "fastattn")
        if contestant == "torch-compile":
            call = torch.compile(call, dynamic=False)

        def step() -> Tensors:
            return self._run(call, self.inputs)

        return step

    def judge(self, contestant: str) -> Judgement | None:
        """The truth in float64: for a softmax of its first rows, for a loss the loss alone."""
        return self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        call, case = self._call(ours=False), self.case
        if case.group == "softmax":
            few = {n: t[:1] if case.causal else t[:JUDGED_ROWS] for n, t in self.inputs.items()}

            def part(name: str, tensor: Tensor) -> Tensor:
                return tensor[: few["dx"].shape[0]]

            over = "the first square" if case.causal else f"rows 0..{few['dx'].shape[0] - 1}"
        else:
            few, over = self.inputs, "the loss"

            def part(name: str, tensor: Tensor) -> Tensor:
                return tensor

        results = []
        for dtype in (torch.float64, case.dtype):
            leaves = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in few.items()}
            made = self._run(call, leaves)
            results.append({n: t for n, t in made.items() if case.group == "softmax" or n == "out"})
        golden, plain = results
        return Judgement(part, golden, plain, over)

    def _run(self, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensors:
        if self.case.direction == "forward":
            with torch.no_grad():
                return {"out": call(*inputs.values())}
        out = call(*inputs.values())
        upstream = self.dout[: out.shape[0]].to(out.dtype) if out.dim() else None
        return {
            "out": out.detach(),
            **dict(zip(inputs, torch.autograd.grad(out, tuple(inputs.values()), upstream))),
        }

    def _call(self, ours: bool) -> Callable[..., Tensor]:
        """The op by fastattn or in torch's own operations."""
        import fastattn

        case, target = self.case, self.target
        functional = torch.nn.functional
        if case.group == "loss":
            loss = fastattn.cross_entropy if ours else functional.cross_entropy
            return lambda logits: loss(logits, target)
        if case.group == "linear-loss" and ours:
            return lambda hidden, weight: fastattn.linear_cross_entropy(hidden, weight, target)
        if case.group == "linear-loss":
            return lambda hidden, weight: functional.cross_entropy(hidden @ weight.T, target)
        if ours:
            return lambda x: fastattn.softmax(x, causal=case.causal)
        if not case.causal:
            return lambda x: x.softmax(-1)
        above = torch.ones(case.columns, case.columns, dtype=torch.bool, device=target.device).triu(1)
        return lambda x: x.masked_fill(above, -torch.inf).softmax(-1)


def cases_for(device: torch.device) -> list[RowCase]:
    """Every case of a device, the most important first."""
    return cpu_cases() if device.type == "cpu" else gpu_cases()


def cpu_cases() -> list[RowCase]:
    """Losses of a small language model, and softmaxes of attention's shapes."""
    return [
        RowCase("linear-loss-1024x32768", "linear-loss", 1024, 32768, width=256),
        RowCase("loss-1024x50257", "loss", 1024, 50257),
        RowCase("softmax-causal-512", "softmax", 48 * 512, 512, causal=True),
        RowCase("softmax-512", "softmax", 48 * 512, 512),
        RowCase("softmax-causal-bf16-512", "softmax", 48 * 512, 512, causal=True, dtype=torch.bfloat16),
        RowCase("softmax-262144", "softmax", 32, 262144),
    ]


def gpu_cases() -> list[RowCase]:
    """Rows of every length in bfloat16, both directions; losses of large vocabularies."""
    cases: list[RowCase] = []
    for direction in ("forward", "forward+backward"):
        cases += [
            RowCase(
                f"softmax-{direction}-{columns}", "softmax", GPU_ELEMENTS // columns, columns,
                dtype=torch.bfloat16, direction=direction,
            )
            for columns in GPU_COLUMNS
        ]  # fmt: skip
    sizes: dict[str, Any] = {"dtype": torch.bfloat16}
    for vocab in (50257, 128256, 151936):
        cases.append(RowCase(f"loss-8192x{vocab}", "loss", 8192, vocab, **sizes))
        cases.append(RowCase(f"linear-loss-8192x{vocab}", "linear-loss", 8192, vocab, width=2048, **sizes))
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("softmax", SCRIPT, cases_for, {}, argv)


if __name__ == "__main__":
    sys.exit(main())
