"""What a transformers model computes before and after a swap: outputs, gradients, and what each position depends on."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers_tiny import LENGTH, Tiny, build, floats

import fastattn
from fastattn import torch_compat
from numerics import SUM_ORDERS, OtherOrder

HIDDEN = 3  # padded positions of the second row


@dataclass
class Outcome:
    """What a check saw: how many modules were swapped, why others were left, and which probes had something to say."""

    name: str
    swapped: int
    left: tuple[str, ...]
    probes: tuple[str, ...]
    dense: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.name}: swapped {self.swapped}, probes {', '.join(self.probes) or 'none'}"
        for what in ("dense", "left"):
            if reasons := "; ".join(dict.fromkeys(getattr(self, what))):
                text += f"; {what}: {reasons}"
        return text


def check(model_type: str, swap: Callable[[Any], Any] = fastattn.swap_attention) -> Outcome:
    """Compare a tiny model of a type before and after a swap; AssertionError names what differs."""
    tiny = build(model_type)
    before = copy.deepcopy(tiny.model)
    report = swap(tiny.model)
    outcome = Outcome(
        type(tiny.model).__name__,
        len(report.swapped),
        tuple(why for _, why in report.left),
        tuple(_probes(tiny)),
        tuple(why for _, why in report.dense),
    )
    if not report.swapped:
        unchanged(before, tiny)
        return outcome
    for padding in ("none", "right", "left"):
        if padding != "none" and tiny.mask is None:
            continue
        arguments, valid = _arguments(tiny, padding)
        try:
            plain = [results(before, arguments, valid)]
        except Exception:
            if padding == "none":
                raise
            continue  # padding that the model itself does not take
        eager = copy.deepcopy(before)
        with contextlib.suppress(Exception):  # the formula with its scores, if the model runs it
            eager.set_attn_implementation("eager")
            plain += results_in_orders(eager, arguments, valid)
        golden = in_float64(before, arguments, valid)
        compare(results(tiny.model, arguments, valid), plain, golden, padding)
    for name in outcome.probes:
        probe(before, tiny, name)
    return outcome


def unchanged(before: Any, tiny: Tiny) -> None:
    """A model of which nothing was swapped computes what it did, bit for bit."""
    outs = []
    for model in (before, tiny.model):
        torch.manual_seed(7)
        with torch.no_grad():
            outs.append(floats(model(**tiny.arguments)))
    for name, out in outs[0].items():
        assert torch.equal(outs[1][name].nan_to_num(), out.nan_to_num()), (
            f"{name} changed though nothing was swapped"
        )


def _arguments(tiny: Tiny, padding: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """Arguments with the last or first positions of the second row hidden, and which positions count."""
    if padding == "none" or tiny.mask is None:
        return tiny.arguments, None
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, -HIDDEN:] = False
    if padding == "left":
        valid = valid.flip(1)
    return tiny.arguments | {tiny.mask: valid.long()}, valid


def _counted(out: Tensor, valid: Tensor | None) -> Tensor:
    return out[valid] if valid is not None and out.shape[:2] == valid.shape else out


def results(model: Any, arguments: dict[str, Tensor], valid: Tensor | None) -> dict[str, Tensor]:
    """Outputs at the positions that count, and the gradients of a weighted sum of them, in float64."""
    dtype = next(model.parameters()).dtype
    arguments = {n: t.to(dtype) if t.is_floating_point() else t for n, t in arguments.items()}
    model.zero_grad()
    torch.manual_seed(7)
    outs = {n: _counted(t, valid) for n, t in floats(model(**arguments)).items()}
    if valid is not None:  # a pooled output may read padding
        outs = {n: t for n, t in outs.items() if t.shape[0] == int(valid.sum())}
    outs = {n: t for n, t in outs.items() if t.isfinite().all()}
    total = sum(
        (t.double() * torch.linspace(-1, 1, t.numel(), dtype=torch.float64).sin().view_as(t)).sum()
        for t in outs.values()
        if t.requires_grad
    )
    if isinstance(total, Tensor):
        total.backward()
    grads = {
        f"grad of {n}": torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for n, p in model.named_parameters()
    }
    return {**{n: t.detach().double() for n, t in outs.items()}, **grads}


def results_in_orders(model: Any, *rest: Any) -> list[dict[str, Tensor]]:
    """Those of `results` with torch's order of summation, and with others."""
    made = [results(model, *rest)]
    for seed in range(SUM_ORDERS):
        with torch_compat.dispatch_mode(OtherOrder(seed)):
            made.append(results(model, *rest))
    return made


def in_float64(model: Any, *rest: Any) -> dict[str, Tensor]:
    """The same in float64 throughout: models go through float32 in norms, softmax and rotary tables."""
    float32, to_float = torch.float32, torch.Tensor.float
    try:
        torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[misc, assignment]
        return results(copy.deepcopy(model).double(), *rest)
    finally:
        torch.float32, torch.Tensor.float = float32, to_float  # type: ignore[misc, method-assign]


def compare(
    actual: dict[str, Tensor], plain: list[dict[str, Tensor]], golden: dict[str, Tensor], what: str
) -> None:
    """Each tensor's error as a share of its norm: at most twice that before the swap, plus eps.

    Of a tensor that is tiny beside the others, as the small difference of large gradients, the share of the hundredth
    part of the largest. Where the model gives no finite result in float64, its own before the swap has to do, and
    1e-4: far above rounding, far below a mask that differs.
    """
    assert actual.keys() >= plain[0].keys(), (
        f"{what}: {sorted(plain[0].keys() - actual.keys())} is not finite"
    )
    exact = golden.keys() == plain[0].keys()
    golden = golden if exact else plain[0]
    largest = max((g.norm().item() for g in golden.values()), default=0.0)

    def share(those: dict[str, Tensor], name: str) -> float:
        error, norm = (those[name] - golden[name]).norm().item(), golden[name].norm().item()
        return error / max(norm, 1e-2 * largest, 1e-30)

    whole = [those for those in plain if those.keys() >= golden.keys()]
    for name in golden:
        allowed = 1e-4
        if exact:
            allowed = 2 * max(share(those, name) for those in whole) + torch.finfo(torch.float32).eps
        error = share(actual, name)
        assert error <= allowed, f"{what}: {name} is off by {error:.3g}, allowed {allowed:.3g}"


def _probes(tiny: Tiny) -> list[str]:
    if tiny.tokens is None:
        return []
    return ["causality"] + (["padding right", "padding left"] if tiny.mask is not None else [])


def probe(before: Any, tiny: Tiny, name: str) -> None:
    """Positions that did not depend on the future, or on padding, before the swap do not after it."""
    padding = name.split()[1] if " " in name else "none"
    arguments, _ = _arguments(tiny, padding)
    changed = dict(arguments)
    ids = arguments[tiny.tokens].clone()  # type: ignore[index]
    where = slice(-HIDDEN, None) if padding != "left" else slice(0, HIDDEN)
    if padding == "none":
        where = slice(-1, None)
        ids[:, where] += 1 - 2 * (ids[:, where] == ids.max()).long()
    else:
        ids[1, where] -= 1
    changed[tiny.tokens] = ids  # type: ignore[index]

    now_largest: dict[str, float] = {}

    def moved(model: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            torch.manual_seed(7)
            one = floats(model(**arguments))
            torch.manual_seed(7)
            two = floats(model(**changed))
        now_largest.update({n: t.abs().max().item() for n, t in one.items() if t.numel()})
        return {
            n: (t - two[n]).abs().flatten(2).amax(-1) if t.dim() > 2 else (t - two[n]).abs()
            for n, t in one.items()
            if t.shape[:2] == ids.shape
        }

    try:
        was = moved(before)
    except Exception:
        return
    now = moved(tiny.model)
    experts = any("expert" in type(m).__name__.lower() for m in before.modules())
    for out, diff in was.items():
        leaks = now[out][diff == 0]
        # an expert multiplies the tokens sent to it at once: their number changes rounding, in any row
        allowed = 16 * torch.finfo(torch.float32).eps * now_largest[out] if experts else 0.0
        if leaks.numel():
            assert leaks.max() <= allowed, f"{name}: {out} moves by {leaks.max():.3g} where it did not"
