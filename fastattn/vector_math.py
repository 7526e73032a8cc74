"""MKL's elementwise functions, each called once before several threads can be the first to call it."""

from __future__ import annotations

from threading import Thread

import torch

# What torch on a CPU computes by MKL's vector mathematics in float32 and float64 (ATen/cpu/vml.h).
FUNCTIONS = (
    torch.acos,
    torch.asin,
    torch.atan,
    torch.cos,
    torch.erf,
    torch.erfc,
    torch.erfinv,
    torch.exp,
    torch.log,
    torch.log10,
    torch.log2,
    torch.sin,
    torch.sqrt,
    torch.tan,
    torch.tanh,
)


def set_up() -> None:
    """Call each function once, with one element.

    MKL picks the kernel of a function in the function's first call in a process. Where several threads make that call,
    each with its part of a large tensor, one of them may run a kernel of half the digits for its part
    (pytorch/pytorch#188792; oneMKL 2024.2, which torch's wheels have).
    """
    # in a thread of its own: modes of the thread that imports, a fake tensor mode among them, would see the calls
    thread = Thread(target=_call_each, name="fastattn-vector-math")
    thread.start()
    thread.join()


def _call_each() -> None:
    for dtype in (torch.float32, torch.float64):
        element = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in FUNCTIONS:
            function(element)
