"""Large results on a CPU in pages of 2 MiB: the first write to each page of 4 KiB costs more than the arithmetic."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

LEAST_BYTES = 2**22  # smaller memory has often been used before, and has its pages
_SYSTEM_PAGE = 4096
_HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux

_advise: Callable[..., Any] | None = None
if sys.platform == "linux":
    try:
        _advise = ctypes.CDLL(None).madvise
        _advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    except (AttributeError, OSError):  # a C library without it
        _advise = None


def in_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, which nothing has written to yet; if it is large, Linux is asked for pages of 2 MiB under it.

    Linux refuses where its administrator has switched them off ("never" in
    /sys/kernel/mm/transparent_hugepage/enabled), and pages stay small.
    """
    if _advise is not None and tensor.is_cpu and tensor.nbytes >= LEAST_BYTES:
        start = -(-tensor.data_ptr() // _SYSTEM_PAGE) * _SYSTEM_PAGE
        _advise(start, tensor.data_ptr() + tensor.nbytes - start, _HUGE_PAGES)
    return tensor
