"""Every op of the emulated extension, called for the first time in its process while a stream is captured.

python capture_calls.py FOLDER    where the extension is, or is compiled to
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cuda_emulation import extension


def main() -> None:
    """Raises where the runtime refuses a call because of the capture."""
    emulated = extension.build(Path(sys.argv[1]))
    emulated.capture(True)
    ops = emulated.module
    # What lies outside the runtime is tried first: torch's own lazy set-up is no concern of this test.
    heads = [torch.randn(1, 1, 64, 64).half() for _ in range(4)]
    whole = (None, False, -1, -1, 0.0, 0.125)
    out, lse = ops.attention_forward(*heads[:3], *whole)
    for one_pass in (False, True):
        ops.attention_backward(heads[3], *heads[:3], out, lse, None, *whole, True, True, one_pass)
    packed = [x[0].transpose(0, 1).contiguous() for x in heads]
    ends = torch.tensor([0, 64], dtype=torch.int32)
    window = (ends, ends, False, -1, -1, 0.0, 0.125)
    out, lse = ops.varlen_forward(*packed[:3], *window)
    ops.varlen_backward(packed[3], *packed[:3], out, lse, None, *window, True, True, False)
    rows = torch.randn(3, 40).half()
    probs = ops.softmax_forward(rows, None, 1, 1.0, False, False, torch.float16)
    ops.softmax_backward(rows, probs, 1, 1.0, False, torch.float16)
    target = torch.tensor([0, 1, 2])
    losses, norms = ops.cross_entropy_forward(rows, target, -100, 0.0, None, 0.0)
    ops.cross_entropy_backward(losses, norms, rows, target, -100, 0.0, None, 0.0, None)


if __name__ == "__main__":
    main()
