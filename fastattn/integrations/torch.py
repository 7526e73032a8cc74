"""Integration with torch: its attention function replaced within a context, and its registry of flash kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import fields
from threading import Lock
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends import warn_once
from fastattn.integrations.sdpa_names import ImportedNames
from fastattn.ops import arguments
from fastattn.ops.sdpa import scaled_dot_product_attention
from fastattn.ops.symbolic import any_proxy
from fastattn.spec import MAX_HEAD_DIM, AttentionCall, GradsNeeded


class sdpa_override(ContextDecorator):
    """While entered, `torch.nn.functional.scaled_dot_product_attention` is fastattn's, whoever calls it.

    A context manager and a decorator of functions; re-entrant, and what was there before is back after an exception,
    too. It exchanges the attribute, and every global of a module that holds the function by a name of its own, for the
    whole process, all threads included, until the last one has left. Reached: every call that looks the function up in
    `torch.nn.functional` or in a module that imported it from there, before or meanwhile, so models written in plain
    torch, timm, diffusers, whisper, transformers' "sdpa", and `nn.MultiheadAttention` and the encoder layers wherever
    they call it (training, or without their inference fast path, and with need_weights=False). Not reached: functions
    kept elsewhere (in attributes, closures, default arguments), calls of `torch.ops.aten`, TorchScript, and the
    inference fast path of torch's encoder layers (`swap_attention` reaches that). Compiled code follows into the
    context and out again, except for calls inside `nn.MultiheadAttention`: they stay what they were when compiled.

    Nested tensors and head dims that fastattn refuses go to the function that was there before, with one warning for
    each reason. Calls inside otherwise take the arguments, and raise the errors, of
    `fastattn.scaled_dot_product_attention`. Leaving without any such call warns once.

    Args:
        backend: "auto", "cuda", "triton" or "torch".

    Raises:
        ValueError: backend is not one of these names.
        TypeError: it decorates a class, a coroutine function or a generator function; use `with` inside those.
    """

    def __init__(self, backend: str = "auto") -> None:
        arguments.check_backend(backend)
        self.backend = backend
        self._mine: list[_Entry] = []
        self._earlier = 0  # calls in earlier entries
        self._began = 0  # the value of `_all_calls` at entry

    @property
    def calls(self) -> int:
        """The number of calls through any override while this was entered; compiled code counts as one per entry."""
        with _lock:
            return self._calls_so_far()

    def _calls_so_far(self) -> int:
        now = _all_calls.number - self._began if self._mine else 0
        return self._earlier + now + sum(entry.compiled for entry in self._mine)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[override]
        """`function`, during whose calls this is entered; TypeError for anything but a plain function."""
        if isinstance(function, type) or any(
            kind(function)
            for kind in (
                inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction,
            )
        ):  # fmt: skip
            raise TypeError(f"sdpa_override: got {function!r}, needs a plain function; use `with` inside it")
        decorated: Callable[..., Any] = super().__call__(function)
        return decorated

    def __enter__(self) -> sdpa_override:
        with _lock:
            if not _entered:
                _before.append(F.scaled_dot_product_attention)
            entry = _Entry(_all_calls.number)
            entry.function = _override(F.scaled_dot_product_attention, self.backend, entry)
            torchs = torch_compat.torch_sdpa()
            entry.of_torchs = (
                entry.function if _before[0] is torchs else _override(torchs, self.backend, entry)
            )
            if not self._mine:
                self._began = _all_calls.number
            _entered.append(entry)
            self._mine.append(entry)
            _put(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:  # threads may leave in another order than they entered
            so_far = self._calls_so_far()
            entry = self._mine.pop()
            _entered.remove(entry)
            entry.active = False
            if not self._mine:
                self._earlier = so_far
            else:
                self._earlier += entry.compiled
            for outer in _entered:
                outer.compiled |= entry.compiled
            if _entered:
                _put(_entered[-1])
            else:
                F.scaled_dot_product_attention = original = _before.pop()
                _names.give_back(original)
            missed = kind is None and entry.began == _all_calls.number and not entry.compiled
        if missed:
            warn_once(_NO_CALLS)


_NO_CALLS = (
    "sdpa_override: left without any call of scaled_dot_product_attention. The model may compute its attention itself, "
    "as for a softcap or returned weights; call another library; run torch's inference fast path, which "
    "swap_attention reaches; be a TorchScript module; or keep the function in an attribute or a closure"
)


class _Entry:
    """One entry of a context."""

    def __init__(self, began: int) -> None:
        self.began = began
        self.active = True
        self.compiled = (
            False  # compiled code has called `function`: it repeats the assignment, and cannot count calls
        )
        self.function: Any = None
        self.of_torchs: Any = None  # the same for names of torch's own function, where that has been replaced


class _Counter:
    """Calls of any override, by any thread."""

    def __init__(self) -> None:
        self.number = 0
        self._lock = Lock()

    def add_one(self) -> None:
        with self._lock:
            self.number += 1


_lock = Lock()
_all_calls = _Counter()
_entered: list[_Entry] = []  # in order of entry
_before: list[Any] = []  # the function before the first entry
_names = ImportedNames()


def _put(entry: _Entry) -> None:
    F.scaled_dot_product_attention = entry.function
    _names.exchange(entry.function, entry.of_torchs, _before[0])


def _override(previous: Callable[..., Tensor], backend: str, entry: _Entry) -> Callable[..., Tensor]:
    """torch's function on a backend of fastattn; what fastattn refuses goes to `previous`."""

    def scaled_dot_product_attention_by_fastattn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if any_proxy(query, key, value):  # a graph holds torch's own function, as without the context
            return previous(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if torch.compiler.is_compiling():
            entry.compiled = True
        else:
            _all_calls.add_one()
        reason = _why_torchs(query, key, value)
        if reason is not None or not entry.active:  # a caller may have kept this function
            if reason is not None:
                warn_once(f"sdpa_override leaves this call to torch: {reason}")
            return previous(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
        )

    return scaled_dot_product_attention_by_fastattn


def _why_torchs(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a call that torch can run must stay with torch."""
    tensors = [t for t in (query, key, value) if isinstance(t, Tensor)]
    if any(t.is_nested for t in tensors):
        return "nested tensors"
    dims = [t.shape[-1] for t in tensors if t.dim() > 0]
    if any(dim > MAX_HEAD_DIM for dim in dims):
        return f"a head dim over {MAX_HEAD_DIM}"
    if any(dim == 0 for dim in dims):
        return "a head dim of 0"
    return None


def register() -> None:
    """Make "fastattn" one of torch's flash-attention implementations for CUDA, without activating it.

    `torch.nn.attention.activate_flash_attention_impl("fastattn")` then runs every scaled_dot_product_attention for
    which torch picks its flash kernel (float16 or bfloat16 on CUDA, without attn_mask) on fastattn, compiled code and
    C++ callers included; `restore_flash_attention_impl()` undoes it. Calling this again changes nothing.

    Raises:
        ImportError: torch has no such registry. Activating it raises a RuntimeError where there is no CUDA device.
    """
    from torch.nn import attention as registry

    if not hasattr(registry, "register_flash_attention_impl"):
        raise ImportError(f"torch {torch.__version__} has no registry of flash-attention implementations")
    registry.register_flash_attention_impl("fastattn", register_fn=_activate)


class _FlashOverrides:
    """Overrides of torch's flash-attention ops for a dispatch key, until `remove`."""

    def __init__(self, dispatch_key: str) -> None:
        self._library: torch.library.Library | None = torch_compat.override_flash_attention(
            dispatch_key, _flash_forward, _flash_backward
        )

    def remove(self) -> None:
        """Restore torch's ops."""
        self._library = None  # its finaliser unregisters


def _activate() -> _FlashOverrides:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "fastattn as a flash-attention implementation: torch finds no CUDA device to run it on"
        )
    return _FlashOverrides("CUDA")


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: (B, H, S, D), causal to the bottom right.

    Dropout's seed travels to the backward in the first half of rng_state.
    """
    if return_debug_mask:
        raise RuntimeError("return_debug_mask: fastattn does not return it, needs False")
    args = arguments.call_arguments(query, key, value, causal=is_causal, dropout_p=dropout_p, scale=scale)
    out, lse = torch.ops.fastattn.attention_fwd(*args, "auto")
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p > 0.0:
        rng_state[:1] = args[_SEED]
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    no_mask = query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], rng_state.view(torch.uint64), unused, no_mask


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    args = arguments.call_arguments(
        query, key, value, causal=is_causal, dropout_p=dropout_p, scale=scale,
        dropout_seed=philox_seed.view(torch.int64)[:1] if dropout_p > 0.0 else None,
    )  # fmt: skip
    needs = list(GradsNeeded())
    dq, dk, dv, *_ = torch.ops.fastattn.attention_bwd(grad_out, None, out, logsumexp, *args, needs, "auto")
    return dq, dk, dv


_SEED = [field.name for field in fields(AttentionCall)].index("dropout_seed")
