"""Packed sequences of unequal length beside padded calls, one call per sequence, and packed kernels of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inputs.varlen import DROPOUT_SEED, VarlenCall, VarlenInputs
from measure import calls
from measure.harness import Budget
from measure.protocols import Judgement, Step
from peers.varlen import find
from report import figures, schema

BUDGET = Budget(seconds=3.0)


@dataclass(frozen=True)
class VarlenCase(VarlenCall):
    """A batch of sequences and its providers."""

    def providers(self, device: torch.device) -> list[str]:
        """Ours first."""
        if self.peers:
            return ["fastattn", *self.peers]
        padded = [f"sdpa-padded-{name}" for name in ("cudnn", "flash", "efficient")]
        others = ["sdpa-loop", "nested", "flex", "varlen_attn", "flash_attn", "xformers"]
        return [*calls.our_backends(), *padded, *others]

    def open(self, device: torch.device) -> VarlenWorkload:
        """Random packed inputs on the device."""
        return VarlenWorkload(self, device)

    def small(self) -> VarlenCase:
        """The same options on three short sequences and two key/value heads."""
        group = self.heads // self.kv_heads
        kv_heads = min(self.kv_heads, 2)
        return replace(
            self, batch=3, shortest=5, longest=70, kv_heads=kv_heads, heads=kv_heads * group, target=None
        )


class VarlenWorkload(VarlenInputs):
    """The packed q, k and v of one case, the same for every provider, and the expected results."""

    def step(self, provider: str) -> Step:
        """One forward, or one with its backward; padded providers work on tensors padded beforehand."""
        call, inputs, dout = find(provider)(self)
        return calls.step_of(call, inputs, dout, self.case.direction)

    def judge(self, provider: str) -> Judgement | None:
        """The expected results in float64 for the first sequence's first key/value head, with all its query heads; None
        for peers with another dropout mask."""
        if self.case.dropout_p and not provider.startswith("fastattn"):
            return None
        expected = self._expected
        length, heads = self.case.lengths[0], {"dk": 1, "dv": 1}
        group = self.case.heads // self.case.kv_heads

        def part(name: str, tensor: Tensor) -> Tensor:
            if provider.startswith("sdpa-padded"):
                tensor = tensor[0, :, :length].transpose(0, 1)
            elif provider == "flex":
                tensor = tensor[0].transpose(0, 1)
            return tensor[:length, : heads.get(name, group)]

        return expected._replace(part=part)

    @cached_property
    def _expected(self) -> Judgement:
        from fastattn import reference

        case, length = self.case, self.case.lengths[0]
        group = case.heads // case.kv_heads
        few = {n: t[:length, : group if n == "dq" else 1] for n, t in self.inputs.items()}

        def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = (t.transpose(0, 1)[None] for t in (query, key, value))
            out = reference.attention(
                *rows, causal=case.causal, dropout_p=case.dropout_p, dropout_seed=DROPOUT_SEED
            )
            assert isinstance(out, Tensor)
            return out[0].transpose(0, 1)

        over = f"sequence 0 of {length} tokens, query heads 0..{group - 1}"
        dout = self.dout[:length, :group]
        return calls.judge_by(
            formula, few, dout, case.direction, case.dtype, lambda name, tensor: tensor, over
        )


def cases_for(device: torch.device) -> list[VarlenCase]:
    """Every case of a device, the most important first."""
    return cpu_cases() if device.type == "cpu" else gpu_cases()


def cpu_cases() -> list[VarlenCase]:
    """Mixed lengths as for an encoder, and documents as for a language model."""
    peers = ("sdpa-padded", "sdpa-loop")

    def case(
        name: str, group: str, sizes: tuple[int, int, int], head_dim: int = 64, **more: Any
    ) -> VarlenCase:
        return VarlenCase(name, group, *sizes, 12, 12, head_dim, peers=peers, **more)

    def faster(speed: float) -> schema.Result:
        return figures.target(speed, "sdpa-padded")

    return [
        case("encoder-8-128", "encoder", (32, 8, 128), direction="forward", target=faster(1.5)),
        case("encoder-16-512", "encoder", (16, 16, 512), target=faster(1.2)),
        case("documents-64-1024", "documents", (8, 64, 1024), causal=True),
        case("equal-512", "documents", (8, 512, 512), causal=True),
        case("sentences-8-56", "encoder", (16, 8, 56), 32),
        case("sentences-8-56-dropout", "encoder", (16, 8, 56), 32, dropout_p=0.1),
    ]


def gpu_cases() -> list[VarlenCase]:
    """About 16k tokens of width 2048 in bfloat16: spread lengths, and equal ones where padding costs nothing."""
    flex = {"provider": "fastattn-triton", "against": "flex", "speed": 1.1}
    cases = []
    for direction in ("forward", "forward+backward"):
        for longest, batch in ((512, 64), (2048, 16), (8192, 4)):
            cases.append(
                VarlenCase(
                    f"{direction}-causal-{longest}", "documents", batch, longest // 16, longest, 16, 16, 128,
                    causal=True, dtype=torch.bfloat16, direction=direction, target=flex,
                )
            )  # fmt: skip
        encoder = (64, 16, 512, 12, 12, 64)
        cases.append(
            VarlenCase(f"{direction}-encoder", "encoder", *encoder, dtype=torch.bfloat16, direction=direction)
        )
        equal = (8, 2048, 2048, 16, 2, 128)
        cases.append(
            VarlenCase(
                f"{direction}-gqa-equal", "documents", *equal, True, torch.bfloat16, direction=direction
            )
        )
    return cases
