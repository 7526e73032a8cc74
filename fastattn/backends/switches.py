"""FASTATTN_DISABLE: parts of backends that must not run, such as a kernel that failed this machine's checks.

A list of `backend.part` separated by commas, a part being an op as backends name them ("attention_bwd") or a way to
run one that a backend chooses itself ("one_pass", "clusters"); a backend's name alone is all of it.
"""

from __future__ import annotations

import os
from functools import lru_cache

VARIABLE = "FASTATTN_DISABLE"
BACKENDS = ("cuda", "triton", "torch")
OPS = (
    "attention",
    "attention_weights",
    "varlen",
    "kv_cache",
    "softmax",
    "cross_entropy",
    "linear_cross_entropy",
)
PARTS = ("one_pass", "clusters", *(f"{op}_{direction}" for op in OPS for direction in ("fwd", "bwd")))


def switched_off(backend: str, part: str) -> str | None:
    """Why a part of a backend is switched off, or None; ValueError where the variable names an unknown part."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    named = _parsed(text)
    said = next((name for name in (f"{backend}.{part}", backend) if name in named), None)
    return None if said is None else f"{VARIABLE} switches {said} off"


@lru_cache(maxsize=8)
def _parsed(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        backend, dot, part = name.partition(".")
        if backend not in BACKENDS or (dot and part not in PARTS):
            raise ValueError(
                f"{VARIABLE}={text!r} names {name!r}: needs a backend of {', '.join(BACKENDS)}, or one with a part of"
                f" {', '.join(PARTS)}, such as cuda.attention_bwd"
            )
    return frozenset(names)
