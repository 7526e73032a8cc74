"""Calls of the CUDA backend through a plan: the extension's function with its arguments ready, and the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_emulation.extension import EmulatedExtension
from torch import Tensor

import fastattn
from fastattn.backends import cuda, replay
from fastattn.ops import plan

HEADS = [(1, 2, 20, 64), (1, 1, 20, 64), (1, 1, 20, 64)]
OFFSETS = torch.tensor([0, 5, 20], dtype=torch.int32)
TARGET = torch.tensor([3, 1, -100, 0])
Call = Callable[..., Any]
CASES: dict[str, tuple[list[tuple[int, ...]], Call]] = {
    "attention": (HEADS, lambda *t: fastattn.attention(*t, return_lse=True, causal=True)),
    "attention, lengths": (HEADS, lambda *t: fastattn.attention(*t, key_lengths=torch.tensor([7]))),
    "attention, negative scale": (HEADS, lambda *t: fastattn.attention(*t, scale=-0.2)),
    "varlen": (
        [(20, 2, 64), (20, 1, 64), (20, 1, 64)],
        lambda *t: fastattn.attention_varlen(*t, OFFSETS, OFFSETS, 15, 15, return_lse=True),
    ),
    "softmax": ([(3, 40)], lambda x: fastattn.softmax(x, scale=0.5)),
    "cross-entropy": ([(4, 40)], lambda x: fastattn.cross_entropy(x, TARGET, label_smoothing=0.1)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND:RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_bits_through_a_plan_are_those_without(
    name: str, emulated_extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, call = CASES[name]
    made: list[replay.Replay] = []
    record = replay.Replay._record
    monkeypatch.setattr(replay.Replay, "_record", lambda self, t: made.append(self) or record(self, t))
    monkeypatch.setattr(cuda, "why_not", lambda spec: None)
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        leaves = [torch.randn(shape).half().requires_grad_() for shape in shapes]
        results = call(*leaves)
        results = list(results) if isinstance(results, tuple) else [results]
        return [*results, *torch.autograd.grad(results, leaves, [torch.randn_like(r) for r in results])]

    monkeypatch.setenv("FASTATTN_DISABLE", "plan")
    expected = [run(seed) for seed in (1, 2)]
    monkeypatch.delenv("FASTATTN_DISABLE")
    for seed in (1, 1, 1, 2):
        for found, alone in zip(run(seed), expected[seed - 1], strict=True):
            assert torch.equal(found, alone)
            assert found.stride() == alone.stride()
    assert plan.count() == 1
    programs = [each.program for each in made]
    assert None not in programs, [each.refusal for each in made]
    functions = list(vars(emulated_extension.module).values())
    done = [step[1] for program in programs if program is not None for step in program.steps]
    assert (
        sum(function in functions for function in done) == 2
    )  # forward and backward, with their arguments ready
