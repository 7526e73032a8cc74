"""What a built extension must do where there is no GPU: load, list its ops, and refuse a call with its reason.

Run by an interpreter whose torch is a CUDA build and whose fastattn is installed, from outside the tree.
"""

from __future__ import annotations

import sys

import torch

import fastattn
from fastattn import backends, extension
from fastattn.spec import SoftmaxSpec

OPS = (
    "attention_forward", "attention_backward", "varlen_forward", "varlen_backward",
    "softmax_forward", "softmax_backward", "cross_entropy_forward", "cross_entropy_backward",
)  # fmt: skip


def main() -> None:
    assert extension.state.cache_info().misses == 0, "importing fastattn looked for the extension"
    found = extension.state()
    assert found.module is not None, found.reason
    print(f"{found.path} for {', '.join(found.info.archs)}, torch {found.info.torch}")
    listed = [name for name in dir(found.module) if callable(getattr(found.module, name))]
    print("ops:", ", ".join(listed))
    assert set(OPS) <= set(listed), f"lacks {set(OPS) - set(listed)}"

    x = torch.randn(3, 4)
    calls = {
        "softmax_forward": lambda: found.module.softmax_forward(x, None, 1, 1.0, False, False, x.dtype),
        "cross_entropy_forward": lambda: found.module.cross_entropy_forward(x, torch.tensor([0, 1, 2])),
        "fastattn.softmax": lambda: fastattn.softmax(x, backend="cuda"),
    }
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            if "device" not in str(error):
                sys.exit(f"{name}: the message names no device")
        else:
            sys.exit(f"{name} ran without a GPU")

    spec = SoftmaxSpec("cuda", 90, torch.float16, 4096, unit_columns=True, int64_offsets=False)
    assert backends.select(spec, "cuda", "softmax_fwd").NAME == "cuda"
    explanation = backends.explanation({"softmax_fwd": spec}, "auto")
    print(explanation)
    assert "measured" in dict(explanation.refusals)["cuda"]


if __name__ == "__main__":
    main()
