"""CUDA errors after which a process cannot use its device, from the runtime's documentation, by code or message."""

from __future__ import annotations

import re

import torch

# cudaError codes whose documentation says that any further work returns the same error and the process must end, with
# cudaGetErrorString's words. Launches with too many resources (701, 720) or during a capture (900) are not among them.
LOST = {
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    709: "context is destroyed",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
}
# As torch, Triton, and NVIDIA's libraries introduce them: "CUDA error: ...", "Triton Error [CUDA]: ...",
# "CUDA driver error: ...". Elsewhere in a message the words mean nothing: torch adds advice about device-side
# assertions to every CUDA error.
_WORDS = re.compile(
    r"(?:cuda(?: runtime| driver)? error|triton error \[cuda\])\s*(?:\(\d+\))?\s*:\s*(?:cudaerror\w+:?\s*)?("
    + "|".join(re.escape(words.lower()) for words in LOST.values())
    + r")(?![\w-])"
)
_NAMED = re.compile(
    r"\bcudaError(?:ECCUncorrectable|NvlinkUncorrectable|Contained|IllegalAddress|LaunchTimeout|ContextIsDestroyed|Assert"
    r"|HardwareStackError|IllegalInstruction|MisalignedAddress|InvalidAddressSpace|InvalidPc|LaunchFailure"
    r"|TensorMemoryLeak)\b"
)


def is_device_lost(error: BaseException) -> bool:
    """Whether no further CUDA call of this process can succeed."""
    code = getattr(error, "error_code", None)  # of torch.AcceleratorError
    if isinstance(code, int):
        return code in LOST
    if not isinstance(error, RuntimeError):  # CUDA's errors are RuntimeErrors; an assertion may quote one
        return False
    text = str(error)
    return bool(_WORDS.search(text.lower()) or _NAMED.search(text))


def lost_after(error: BaseException, device: torch.device) -> bool:
    """The same; where the error does not tell, a call of the device does, which fails on a lost device."""
    if is_device_lost(error):
        return True
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception as second:
        return is_device_lost(second)
    return False
