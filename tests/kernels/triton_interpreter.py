"""Triton's interpreter made to compute what a GPU does with bfloat16, without work whose results are not used.

Without this, `tl.dot` multiplies the 16-bit patterns of bfloat16 operands as integers and a float32 value stored as
bfloat16 is cut off instead of rounded; every device function called prepares triton.language anew, every tensor is
copied onto itself at the end, and every sum and product of integers is computed a second time in 64 bits for an
assertion that is made in debug mode only, half of a kernel's time. Triton interprets only where TRITON_INTERPRET=1 was
set before its import.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import numpy as np

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of float32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(values), quiet_nan, rounded)


def widen_bfloat16(patterns: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return (np.ascontiguousarray(patterns).astype(np.uint32) << 16).view(np.float32)


class Correction:
    """Replaces the interpreter's wrong pieces while installed."""

    def __init__(self) -> None:
        from triton.runtime import interpreter

        self.module = interpreter
        self.builder = interpreter.InterpreterBuilder
        self.saved: list[tuple[Any, str, Any]] = []
        self.patched: set[int] | None = None  # of the launch under way: whose functions' modules are patched

    def install(self) -> None:
        """Put the corrected functions in place, if they are not yet."""
        if self.saved:
            return
        self._replace(self.builder, "cast_impl", self._cast)
        self._replace(self.builder, "create_fp_to_fp", self._convert)
        self._replace(self.builder, "create_dot", self._dot)
        self._replace(self.module.GridExecutor, "__call__", self._launch)
        self._replace(self.module.GridExecutor, "_restore_args_dev", self._leave_in_place)
        self._replace(self.module, "_patch_lang", self._patch_once)
        self._replace(self.module, "_get_np_dtype", self._remembered)
        builder = self.module.interpreter_builder
        self._replace(
            builder, "options", lambda original: replace(original, sanitize_overflow=original.debug)
        )

    def remove(self) -> None:
        """Put Triton's own functions back."""
        while self.saved:
            setattr(*self.saved.pop())

    def _replace(self, owner: Any, name: str, make: Any) -> None:
        original = getattr(owner, name)
        self.saved.append((owner, name, original))
        setattr(owner, name, make(original))

    def _cast(self, original: Any) -> Any:
        def cast_impl(builder: Any, source: Any, target: Any) -> Any:
            cast = self._bfloat16_cast(source, target)
            return original(builder, source, target) if cast is None else cast

        return cast_impl

    def _convert(self, original: Any) -> Any:
        def create_fp_to_fp(builder: Any, source: Any, target: Any, rounding: Any) -> Any:
            cast = self._bfloat16_cast(source, target)
            return original(builder, source, target, rounding) if cast is None else cast

        return create_fp_to_fp

    def _bfloat16_cast(self, source: Any, target: Any) -> Any:
        tl, handle = self.module.tl, self.module.TensorHandle
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(round_to_bfloat16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widen_bfloat16(source.data), tl.float32)
        return None

    def _dot(self, original: Any) -> Any:
        tl, handle = self.module.tl, self.module.TensorHandle

        def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            if a.dtype.scalar == tl.bfloat16:
                a, b = (handle(widen_bfloat16(x.data), tl.float32) for x in (a, b))
            return original(builder, a, b, *rest)

        return create_dot

    def _launch(self, original: Any) -> Any:
        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.patched = set()
            try:
                return original(executor, *args, **kwargs)
            finally:
                self.patched = None

        return call

    def _leave_in_place(self, original: Any) -> Any:
        """Kernels wrote to the CPU tensors themselves; copying back would write every page of their storages."""
        return lambda *args: None

    def _remembered(self, original: Any) -> Any:
        """A type's numpy dtype is looked up in a dict; Triton makes that dict in every call."""
        known: dict[str, Any] = {}

        def get_np_dtype(dtype: Any) -> Any:
            name = dtype.scalar.name  # a pointer's is its own
            if name not in known:
                known[name] = original(dtype)
            return known[name]

        return get_np_dtype

    def _patch_once(self, original: Any) -> Any:
        """A launch patches triton.language anew for every device function called; once per module is enough."""

        def patch_lang(function: Any) -> Any:
            module = id(function.__globals__)
            if self.patched is None or module not in self.patched:
                if self.patched is not None:
                    self.patched.add(module)
                return original(function)
            return None

        return patch_lang


@functools.cache
def correction() -> Correction:
    """The one of this process, whoever installs it: of two, one removed would leave the other."""
    return Correction()
