"""A planned call enters few Python functions before its launch, and launches what a call without a plan does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plan_cases import OPTIONS, heads, in_order
from torch import Tensor

import fastattn
from fastattn.ops import plan


def functions_until(launch: Callable[[Any, Any], bool], call: Callable[[], Any]) -> list[str]:
    """Python functions that a call enters up to the launch, which frames or built-in functions tell, in order."""
    for _ in range(3):
        call()
    entered: list[str] = []
    launched = False

    def watch(frame: Any, event: str, arg: Any) -> None:
        nonlocal launched
        if launched or event not in ("call", "c_call"):
            return
        launched = launch(frame, arg) if event == "c_call" else launch(frame, None)
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert launched
    return entered[1:]  # but the lambda


FEWEST = 14  # docs/architecture.md lists them


@pytest.mark.parametrize("grad", [False, True])
def test_few_python_functions_lie_between_the_call_and_the_launch(grad: bool) -> None:
    tensors = [t.requires_grad_(grad) for t in heads(torch.float32, kv=4)]
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    entered = functions_until(
        lambda frame, arg: getattr(arg, "__name__", "") == flash,
        lambda: fastattn.attention(*tensors, causal=True),
    )
    assert entered[0] == "attention"
    assert len(entered) <= FEWEST, entered


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("grad", [False, True])
def test_few_python_functions_lie_before_a_triton_launch(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.arguments import Launch

    def run(launch: Any) -> None:
        pass

    monkeypatch.setattr(Launch, "start", run)
    tensors = [t.requires_grad_(grad) for t in heads(torch.float32, kv=4)]
    entered = functions_until(
        lambda frame, arg: frame.f_code is run.__code__,
        lambda: fastattn.attention(*tensors, causal=True, backend="triton"),
    )
    own = [
        name for name in entered if name not in ("_replace", "_make", "<lambda>")
    ]  # a namedtuple's, and our stub
    assert len(own) <= FEWEST, entered


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", ["plain", "causal", "lse", "window", "softcap", "mask", "sinks"])
def test_triton_launches_the_same_with_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.arguments import Launch

    launches: list[Any] = []
    monkeypatch.setattr(Launch, "start", lambda launch: launches.append(launch))

    def described(launch: Any) -> Any:
        flat = [x for arg in launch.args for x in (arg if isinstance(arg, tuple) else (arg,))]
        args = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in flat]
        return launch.kernel, launch.grid, args, launch.options

    for tensors in (heads(torch.float16), in_order(heads(torch.bfloat16)), heads(torch.float32, 1, 12)):
        plan.clear()
        options = {**OPTIONS[name], "backend": "triton"}
        if tensors[0].shape[2] == 1:
            options.pop("mask", None)
        found = []
        for _ in range(4):
            launches.clear()
            fastattn.attention(*tensors, **options)
            found.append([described(launch) for launch in launches])
        assert plan.count() == 1
        assert found[0] == found[1] == found[2] == found[3]
        assert found[0]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_plans_know_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shape with one set of strides, aligned or one element later; and gradients may come from anywhere."""
    from fastattn.kernels.arguments import Launch
    from fastattn.kernels.variants import AttentionVariant

    launches: list[Any] = []
    monkeypatch.setattr(Launch, "start", lambda launch: launches.append(launch))

    def units() -> set[int]:
        found = {arg.unit for launch in launches for arg in launch.args if isinstance(arg, AttentionVariant)}
        launches.clear()
        return found

    def moved(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    aligned = [t.requires_grad_() for t in heads(torch.float16)]
    later = [moved(t.detach()).requires_grad_() for t in aligned]
    for _ in range(4):
        for tensors, unit in ((aligned, 8), (later, 1), ([aligned[0], later[1], aligned[2]], 1)):
            out = fastattn.attention(*tensors, backend="triton")
            assert units() == {unit}
            for dout in (torch.ones_like(out), moved(torch.ones_like(out))):
                torch.autograd.grad(out, tensors, dout, retain_graph=True)
                assert units() == {unit if dout.data_ptr() % 16 == 0 else 1}
    assert plan.count() == 3
