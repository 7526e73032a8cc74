"""FASTATTN_DISABLE: parts of backends that must not run, such as a kernel that failed this machine's checks.

A list of `backend.part` separated by commas, a part being an op as backends name them ("attention_bwd") or a way to
run one that a backend chooses itself ("one_pass", "clusters"); a backend's name alone is all of it.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

VARIABLE = "FASTATTN_DISABLE"
BACKEND_VARIABLE = "FASTATTN_BACKEND"
INTERPRETER_VARIABLE = "TRITON_INTERPRET"  # Triton's own
BACKENDS = ("cuda", "triton", "torch")
PLAN = "plan"
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


def plans_are_off() -> bool:
    """Whether the variable names "plan"."""
    return PLAN in _parsed(os.environ.get(VARIABLE, ""))


_VARIABLES = (BACKEND_VARIABLE, VARIABLE, INTERPRETER_VARIABLE)


def _raw_environment() -> tuple[Any, tuple[Any, ...]]:
    """The mapping inside `os.environ` and the variables' names in it: a look there takes a tenth of the time. Where
    Python has no such mapping, `os.environ` itself and the plain names."""
    raw, encode = getattr(os.environ, "_data", None), getattr(os.environ, "encodekey", None)
    if isinstance(raw, dict) and encode is not None:
        names = tuple(encode(name) for name in _VARIABLES)
        if all((name in raw) == (plain in os.environ) for name, plain in zip(names, _VARIABLES)):
            return raw, names
    return os.environ, _VARIABLES


_RAW, (_BACKEND, _DISABLE, _INTERPRETER) = _raw_environment()
UNSET = (None, None, None)


def environment() -> tuple[Any, Any, Any]:
    """What the variables say now on which the choice of a backend depends, to be compared only; UNSET itself if all
    are unset. One of an empty text counts as unset."""
    forced, disabled, interpreter = _RAW.get(_BACKEND), _RAW.get(_DISABLE), _RAW.get(_INTERPRETER)
    if not (forced or disabled or interpreter):
        return UNSET
    return forced or None, disabled or None, interpreter or None


@lru_cache(maxsize=8)
def _parsed(text: str) -> frozenset[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        backend, dot, part = name.partition(".")
        if name != PLAN and (backend not in BACKENDS or (dot and part not in PARTS)):
            raise ValueError(
                f"{VARIABLE}={text!r} names {name!r}: needs a backend of {', '.join(BACKENDS)}, or one with a part of"
                f" {', '.join(PARTS)}, such as cuda.attention_bwd, or {PLAN}"
            )
    return frozenset(names)
