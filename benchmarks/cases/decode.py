"""Decoding: one new token per sequence against a key/value cache, contiguous or paged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from inputs.decode import DecodeCall, DecodeInputs
from measure import calls
from measure.harness import Budget
from measure.protocols import Judgement, Step, Tensors
from peers.decode import find
from report import figures, schema

BUDGET = Budget(seconds=2.0, memory=False)


@dataclass(frozen=True)
class DecodeCase(DecodeCall):
    """A step of decoding and its providers."""

    def providers(self, device: torch.device) -> list[str]:
        """Ours first."""
        if self.peers:
            return ["fastattn", *self.peers]
        pinned = [f"sdpa-{name}" for name in ("cudnn", "flash", "efficient", "math")]
        return [*calls.our_backends(), *pinned, "flex", "flash_attn"]

    def open(self, device: torch.device) -> DecodeWorkload:
        """Random caches on the device."""
        return DecodeWorkload(self, device)

    def small(self) -> DecodeCase:
        """The same options on a short cache and two key/value heads."""
        group, kv_heads = self.heads // self.kv_heads, min(self.kv_heads, 2)
        return replace(
            self, batch=min(self.batch, 3), length=40, kv_heads=kv_heads, heads=kv_heads * group,
            page=16 if self.page else 0, target=None,
        )  # fmt: skip


class DecodeWorkload(DecodeInputs):
    """The inputs of one case, the same for every provider, and the expected results."""

    def step(self, provider: str) -> Step:
        """Append the new token and attend to everything cached, the token itself included."""
        call = find(provider)(self)

        def step() -> Tensors:
            with torch.no_grad():
                return {"out": call()}

        return step

    def judge(self, provider: str) -> Judgement | None:
        """The expected results in float64 for the last sequence, the longest, and its first key/value head."""
        return self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        from fastattn import reference

        group, length = self.case.heads // self.case.kv_heads, self.case.lengths[-1]
        rows = self.k_cache, self.v_cache
        if self.block_table is not None:
            rows = tuple(self.gathered(cache)[-1:] for cache in rows)  # type: ignore[assignment]
        keys, values = (
            torch.cat([cache[-1:, :1, :length], new[-1:, :1]], dim=2)
            for cache, new in zip(rows, (self.key, self.value))
        )
        few = {"query": self.query[-1:, :group], "key": keys, "value": values}

        def formula(*operands: Tensor) -> Tensor:
            out = reference.attention(*operands)
            assert isinstance(out, Tensor)
            return out

        over = f"the last sequence, query heads 0..{group - 1}"
        return calls.judge_by(
            formula, few, None, "forward", self.case.dtype, lambda name, t: t[-1:, :group], over
        )


def cases_for(device: torch.device) -> list[DecodeCase]:
    """Every case of a device, the most important first."""
    return cpu_cases() if device.type == "cpu" else gpu_cases()


def cpu_cases() -> list[DecodeCase]:
    """A small model's decoding: one sequence or a few, short and long caches."""
    mha = {"heads": 12, "kv_heads": 12, "head_dim": 64, "peers": ("sdpa",)}
    gqa = {**mha, "heads": 16, "kv_heads": 2}

    def faster(speed: float) -> schema.Result:
        return figures.target(speed, "sdpa")

    of_groups = {**gqa, "peers": ("sdpa", "flex"), "target": faster(1.3)}
    of_halves = {**mha, "dtype": torch.bfloat16, "target": faster(2.5)}
    cases = [
        DecodeCase("mha-1x2048", "equal", 1, 2048, **mha),  # type: ignore[arg-type]
        DecodeCase("gqa-1x2048", "equal", 1, 2048, **of_groups),  # type: ignore[arg-type]
        DecodeCase("mha-8x1024", "equal", 8, 1024, **mha),  # type: ignore[arg-type]
        DecodeCase("mha-8x1024-ragged", "ragged", 8, 1024, **mha),  # type: ignore[arg-type]
        DecodeCase("gqa-8x1024-paged", "paged", 8, 1024, page=64, **gqa),  # type: ignore[arg-type]
        DecodeCase("mha-1x2048-bf16", "equal", 1, 2048, **of_halves),  # type: ignore[arg-type]
    ]
    return cases + [DecodeCase(f"mha-1x{n}", "equal", 1, n, **mha) for n in (128, 512, 8192)]  # type: ignore[arg-type]


def gpu_cases() -> list[DecodeCase]:
    """KV 2k..128k, batch 1..64, MHA and GQA 8:1 in bfloat16; then unequal lengths and pages."""
    heads = {"mha": (16, 16), "gqa": (64, 8)}
    sizes = [(64, 2048), (16, 8192), (1, 131072), (4, 32768), (1, 8192), (16, 2048), (64, 8192), (1, 2048)]
    cases = [
        DecodeCase(f"{kind}-{batch}x{length}", "equal", batch, length, h, kv, 128, torch.bfloat16)
        for batch, length in sizes
        for kind, (h, kv) in heads.items()
    ]
    cases += [
        DecodeCase("gqa-32x8192-ragged", "ragged", 32, 8192, 64, 8, 128, torch.bfloat16),
        DecodeCase("gqa-32x8192-paged", "paged", 32, 8192, 64, 8, 128, torch.bfloat16, page=64),
        DecodeCase("gqa-32x8192-paged-256", "paged", 32, 8192, 64, 8, 128, torch.bfloat16, page=256),
    ]
    return cases
