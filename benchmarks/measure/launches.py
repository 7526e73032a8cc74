"""Kernel launches of a call on a GPU, as torch's profiler sees them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from measure.protocols import Step

LAUNCHES = frozenset({"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"})


def count(step: Step) -> int:
    """How many kernels a step launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    return among(event.name for event in profile.events() or ())


def among(names: Iterable[str]) -> int:
    """How many of a profile's events are launches."""
    return sum(name in LAUNCHES for name in names)
