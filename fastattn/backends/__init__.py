"""Which kernel runs a call: the backends in order of preference, the choice among them, and its reasons.

A backend is a module with
    NAME                                what users call it
    LAYOUT                              what it relies on in the layouts of tensors, a level of fastattn.backends.layout
    why_not(spec) -> str | None         why it cannot run this spec
    why_not_auto(spec) -> str | None    why "auto" should not choose it although it can run (optional)
    MAKES_GRADIENTS                     names of forwards that take a gradient of their results and also return those of
                                        their inputs (optional; linear_cross_entropy's does so on every backend).
                                        cross_entropy_fwd then comes with read_targets, whose result it also takes
    READS_NO_VALUES                     True if nothing its functions do depends on values of tensors: their work can
                                        then be recorded and replayed (optional; fastattn.backends.replay)
    tiles(spec) -> str | None           its launch parameters in a line, for `explain` (optional; <op>_tiles for
                                        other ops than attention)
and, per op, functions of (spec, call, ...) named <op>_fwd and <op>_bwd. All return the same residuals, so the forward
of one and the backward of another agree.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch as pytorch  # this package has a module named torch

from fastattn.backends import cuda as cuda_backend
from fastattn.backends import switches
from fastattn.backends import torch as torch_backend
from fastattn.backends import triton as triton_backend
from fastattn.backends.switches import switched_off
from fastattn.spec import AttentionCall, AttentionSpec, SoftmaxSpec

if TYPE_CHECKING:
    from rich.table import Table

Spec = AttentionSpec | SoftmaxSpec

# Fastest first: the order is the policy. "auto" takes cuda only where it was measured to be faster than triton.
BACKENDS: tuple[ModuleType, ...] = (cuda_backend, triton_backend, torch_backend)
NAMES = tuple(backend.NAME for backend in BACKENDS)

_warned: set[str] = set()


@dataclass(frozen=True)
class Explanation:
    """The backend that would run each pass of a call, its tiles, and the reasons of those that would not run it.

    `print` writes it as plain lines, `rich.print` as a table, `to_dict` gives plain types.

    Attributes:
        backend: "cuda", "triton" or "torch", for the forward pass.
        tiles: its launch parameters in a line, None where it has none.
        refusals: (backend, reason) of each that would not run it, in order of preference.
        spec: the properties of the call that backends decide on.
        backward: the backend of the backward pass; None where no input requires grad or the forward pass makes the
            gradients.
        backward_tiles: as tiles, of the backward pass.
        backward_refusals: as refusals, of the backward pass.
        weights: the backend of the weights that `return_weights` asks for; None where it does not.
        weights_refusals: as refusals, of the weights.
        weights_backward: the backend of the weights' gradients; None where there are none.
        weights_backward_refusals: as refusals, of the weights' gradients.
        plan: "planned" where calls of this kind run, from the third on, without checks and choices that were made
            before; else "not planned: " and the reason. None where it was not asked for.
    """

    backend: str
    tiles: str | None
    refusals: tuple[tuple[str, str], ...]
    spec: Spec
    backward: str | None = None
    backward_tiles: str | None = None
    backward_refusals: tuple[tuple[str, str], ...] = ()
    weights: str | None = None
    weights_refusals: tuple[tuple[str, str], ...] = ()
    weights_backward: str | None = None
    weights_backward_refusals: tuple[tuple[str, str], ...] = ()
    plan: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types, for JSON; refusals as a dict from backend to reason."""
        spec = {name: str(v) if name == "dtype" else v for name, v in asdict(self.spec).items()}
        return {
            "backend": self.backend,
            "tiles": self.tiles,
            "refusals": dict(self.refusals),
            "backward": self.backward,
            "backward_tiles": self.backward_tiles,
            "backward_refusals": dict(self.backward_refusals),
            "weights": self.weights,
            "weights_refusals": dict(self.weights_refusals),
            "weights_backward": self.weights_backward,
            "weights_backward_refusals": dict(self.weights_backward_refusals),
            "plan": self.plan,
            "spec": spec,
        }

    def _rows(self) -> list[tuple[str, str, str]]:
        """Rows of (statement, backend, tiles or reason)."""
        rows = [("backend", self.backend, self.tiles or "")]
        if self.backward:
            rows.append(("backward", self.backward, self.backward_tiles or ""))
        if self.weights:
            rows.append(("weights", self.weights, ""))
        if self.weights_backward:
            rows.append(("weights backward", self.weights_backward, ""))
        if self.plan:
            planned, _, reason = self.plan.partition(": ")
            rows.append(("plan", planned, reason))
        rows += [("not", name, reason) for name, reason in self.refusals]
        for said, refusals in (
            ("backward not", self.backward_refusals),
            ("weights not", self.weights_refusals),
            ("weights backward not", self.weights_backward_refusals),
        ):
            rows += [(said, *refusal) for refusal in refusals if refusal not in self.refusals]
        return rows

    def __str__(self) -> str:
        lines = []
        for said, name, detail in self._rows():
            if said.endswith("not"):
                lines.append(f"{said} {name}: {detail}")
            else:
                lines.append(f"{said}: {name}" + (f" ({detail})" if detail else ""))
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        table.add_column("backend")
        table.add_column("tiles, or why not", overflow="fold")
        for said, name, detail in self._rows():
            style = "dim" if said.endswith("not") else "green"
            table.add_row(Text(said, style="dim"), Text(name, style=style), Text(detail))
        return table


def select(spec: Spec, name: str = "auto", op: str = "attention_fwd") -> ModuleType:
    """The backend that runs `spec`.

    A named backend that cannot raises its reason; "auto" takes the first that can, after FASTATTN_BACKEND.
    """
    name = resolve(name)
    if name != "auto":
        backend = BACKENDS[NAMES.index(name)]
        reason = _why_not(backend, spec, op)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run this call: {reason}")
        return backend
    passed_over: list[str] = []
    for backend in BACKENDS:
        reason = _why_not(backend, spec, op) or _why_not_auto(backend, spec)
        if reason is None:
            if backend is torch_backend and spec.device != "cpu":
                warn_once(
                    f"fastattn runs this call without a fused kernel, on backend='torch' ({'; '.join(passed_over)})"
                )
            return backend
        passed_over.append(f"{backend.NAME}: {reason}")
    raise RuntimeError(f"no backend can run this call: {'; '.join(passed_over)}")


def refusals(spec: Spec, name: str = "auto", op: str = "attention_fwd") -> list[tuple[str, str]]:
    """(backend, reason) for every backend that would not run `spec`."""
    forced = resolve(name) if name == "auto" else "auto"
    reasons = []
    for backend in BACKENDS:
        if forced == "auto":
            reason = _why_not(backend, spec, op)
            if reason is None and name == "auto":
                reason = _why_not_auto(backend, spec)
        else:
            reason = None if forced == backend.NAME else f"FASTATTN_BACKEND={forced} forces another"
        if reason is not None:
            reasons.append((backend.NAME, reason))
    return reasons


def select_all(passes: Mapping[str, Spec], name: str) -> None:
    """Raise what `select` would raise in any pass of a call; `passes` are specs by names of backend functions."""
    for function, spec in passes.items():
        select(spec, name, function)


def runs_every_pass(name: str) -> bool:
    """Whether no pass of a call can be refused: "auto" and "torch" run all, unless an environment variable is set."""
    forced, disabled, _ = switches.environment()
    return (name == "auto" or name == torch_backend.NAME) and forced is None and disabled is None


def check_has(name: str, function: str) -> None:
    """Refuse a named backend that runs `function` for no spec, which is known even while a call is traced."""
    name = resolve(name)
    if name != "auto" and (reason := _lacks(BACKENDS[NAMES.index(name)], function)) is not None:
        raise RuntimeError(f"backend={name!r} cannot run this call: {reason}")


def explanation(passes: Mapping[str, Spec], name: str, plan: str | None = None) -> Explanation:
    """The choices of `select` for a call's passes, and why; `passes` as in `select_all`, the forward first."""
    found = {_kind_of(function): _explain_pass(spec, name, function) for function, spec in passes.items()}
    forward = found["forward"]
    backward, weights, weights_backward = (
        found.get(kind, _NONE) for kind in ("backward", "weights", "weights_backward")
    )
    assert forward.backend is not None
    return Explanation(
        forward.backend, forward.tiles, forward.refusals, next(iter(passes.values())), backward.backend,
        backward.tiles, backward.refusals, weights.backend, weights.refusals, weights_backward.backend,
        weights_backward.refusals, plan,
    )  # fmt: skip


def _kind_of(function: str) -> str:
    """ "forward" or "backward", or of the weights that attention returns, "weights" or "weights_backward"."""
    op, _, direction = function.rpartition("_")
    if op == "attention_weights":
        return "weights" if direction == "fwd" else "weights_backward"
    return "forward" if direction == "fwd" else "backward"


@dataclass(frozen=True)
class _Chosen:
    """The backend of one pass of a call, and the refusals of the others."""

    backend: str | None = None
    tiles: str | None = None
    refusals: tuple[tuple[str, str], ...] = ()


_NONE = _Chosen()


def _explain_pass(spec: Spec, name: str, function: str) -> _Chosen:
    chosen = select(spec, name, function)
    op = function.rpartition("_")[0]
    tiles = getattr(chosen, "tiles" if op == "attention" else f"{op}_tiles", None)
    return _Chosen(chosen.NAME, tiles(spec) if tiles else None, tuple(refusals(spec, name, function)))


def available() -> list[tuple[str, str | None]]:
    """(backend, None or why it cannot run on this machine at all), judged by a plain call on the best device."""
    device = "cuda" if pytorch.cuda.is_available() else "cpu"
    query = pytorch.empty(1, 1, 16, 64, device=device, dtype=pytorch.float16)
    spec = AttentionSpec.of(AttentionCall(query, query, query))
    return [
        (backend.NAME, _why_not(backend, spec, "attention_fwd") or _why_not_auto(backend, spec))
        for backend in BACKENDS
    ]


def resolve(name: str) -> str:
    """The backend that `name` means: for "auto", the value of FASTATTN_BACKEND where that is set and not empty."""
    forced = (os.environ.get(switches.BACKEND_VARIABLE) or "auto") if name == "auto" else "auto"
    if forced == "auto":
        return name
    if forced not in NAMES:
        raise ValueError(f"FASTATTN_BACKEND={forced!r} is not a backend: choose auto, {', '.join(NAMES)}")
    warn_once(f"FASTATTN_BACKEND={forced} forces this backend for every call that does not name one")
    return forced


def warn_once(message: str) -> None:
    """Warn the first time a message is seen in this process, at the line that called this package.

    Code that is being compiled cannot warn.
    """
    if pytorch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "fastattn",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _why_not(backend: ModuleType, spec: Spec, op: str) -> str | None:
    reason: str | None = backend.why_not(spec)
    return reason or _lacks(backend, op)


def _lacks(backend: ModuleType, op: str) -> str | None:
    return switched_off(backend.NAME, op) if hasattr(backend, op) else f"it has no {op}"


def _why_not_auto(backend: ModuleType, spec: Spec) -> str | None:
    return backend.why_not_auto(spec) if hasattr(backend, "why_not_auto") else None
