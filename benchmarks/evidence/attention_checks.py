"""Checks of attention on a device: random calls against float64, known faults of cuDNN, determinism, 64-bit offsets."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evidence.findings import Finding, announce_call, attempt, backends_here, finding, refused_or_failed
from inputs.random_attention import SEQUENCES, RandomCall
from inputs.random_kv_cache import CacheCall
from measure.errors import excess, ratios_of
from measure.protocols import REFUSED

MOST_FAILURES = 10  # that are reported one by one; all are counted
INTERPRETED_LENGTH = 70  # the greatest length where Triton is interpreted


def check_random(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Random calls on each backend that accepts them: forward, and backward from gradients of out and lse."""
    from fastattn import attention

    yield from _judge("random", RandomCall, attention, device, seconds, seed)


def check_kv_cache(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Random calls against a cache on each backend that accepts them; the cache afterwards is compared too."""
    from fastattn import attention_kv_cache

    yield from _judge("kv-cache", CacheCall, attention_kv_cache, device, seconds, seed)


def _judge(
    check: str,
    draw: Callable[[int, torch.device, int], RandomCall | CacheCall],
    op: Callable[..., Any],
    device: torch.device,
    seconds: float,
    seed: int,
) -> Iterator[Finding]:
    """Random calls of an op against the reference in float64, for `seconds`."""
    from fastattn import reference

    names = backends_here(device)
    counts: Counter[tuple[str, str]] = Counter()
    worst: dict[str, float] = dict.fromkeys(names, 0.0)
    longest = SEQUENCES[-1] if device.type == "cuda" else INTERPRETED_LENGTH
    stop = time.monotonic() + seconds
    number = 0
    while time.monotonic() < stop:
        call = draw(seed + number, device, longest)
        number += 1
        announce_call(check, "reference", call.describe(), device)
        references, wrong = attempt(
            lambda: tuple(call.run(reference.attention, dtype) for dtype in (torch.float64, call.dtype)),  # noqa: B023
            device,
        )
        if references is None:
            yield finding(
                check, "failed", f"the reference: {wrong} in {call.describe()}", seed=seed + number - 1
            )
            continue
        for name in names:
            announce_call(check, name, call.describe(), device)
            ratios, wrong = attempt(lambda: _ratios(call, op, name, *references), device)  # noqa: B023
            if wrong is not None and "_bwd off" in wrong:  # FASTATTN_DISABLE names its backward only
                ratios, wrong = attempt(lambda: _ratios(call, op, name, *references, gradients=False), device)  # noqa: B023
                counts[name, "forward"] += wrong is None
            if ratios is None:
                if REFUSED in str(wrong):
                    counts[name, "refused"] += 1
                    continue
                counts[name, "failed"] += 1
                if counts[name, "failed"] <= MOST_FAILURES:
                    text = f"{wrong} in {call.describe()}"
                    yield finding(check, "failed", text, backend=name, seed=seed + number - 1)
                continue
            top = max(ratios, key=lambda key: ratios[key])
            worst[name] = max(worst[name], ratios[top])
            good = ratios[top] <= 1
            counts[name, "passed" if good else "failed"] += 1
            if not good and counts[name, "failed"] <= MOST_FAILURES:
                detail = f"{top} at {ratios[top]:.3g} of what is allowed: {call.describe()}"
                yield finding(check, "failed", detail, backend=name, seed=seed + number - 1)
    for name in names:
        passed, failed, refused = (counts[name, kind] for kind in ("passed", "failed", "refused"))
        status = "failed" if failed else "passed" if passed else "skipped"
        detail = f"{passed} passed, {failed} failed, {refused} refused"
        detail += f"; worst {worst[name]:.2f} of what is allowed"
        if counts[name, "forward"]:
            detail += f"; {counts[name, 'forward']} of them without gradients"
        yield finding(check, status, detail, backend=name, summary=True)


def _ratios(
    call: RandomCall | CacheCall,
    op: Callable[..., Any],
    name: str,
    golden: dict[str, Tensor],
    plain: dict[str, Tensor],
    **options: Any,
) -> dict[str, float]:
    """By result, the part of the allowed error that a backend uses."""
    from fastattn import reference

    actual = call.run(op, call.dtype, backend=name, **options)
    terms = {key: t for key, t in call.cancelling_terms().items() if key in actual}
    golden = {key: golden[key] for key in actual}
    again = partial(call.run, reference.attention, call.dtype)
    return ratios_of(actual, plain, golden, call.dtype, lambda: {key: again()[key] for key in actual}, terms)


def check_cudnn_trap(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Length 64 modulo 128 and rows whose lse is below -88.7, where cuDNN's masked backward is known to give NaN."""
    from fastattn import attention, reference

    length = 192 if device.type == "cuda" else 64
    generator = torch.Generator(device).manual_seed(seed)
    query, key, value, dout = (
        torch.randn(1, 2, length, 64, generator=generator, device=device).half() for _ in range(4)
    )
    bias = torch.randn(1, 1, length, length, generator=generator, device=device)
    bias[:, :, ::3] -= 200.0

    def run(attend: Callable[..., Any], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        out = attend(*leaves, bias=bias.to(dtype), **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    golden = run(reference.attention, torch.float64)
    plain = run(reference.attention, torch.float16)
    for name in backends_here(device):
        announce_call("cudnn-trap", name, f"S{length} D64", device)
        actual, wrong = attempt(lambda: run(attention, torch.float16, backend=name), device)  # noqa: B023
        if actual is None:
            yield refused_or_failed("cudnn-trap", str(wrong), name)
            continue
        worst = max(excess(a, p, g, torch.float16) for a, p, g in zip(actual, plain, golden))
        yield finding(
            "cudnn-trap",
            "passed" if worst <= 1 else "failed",
            f"{worst:.2f} of what is allowed",
            backend=name,
        )
    if device.type == "cuda":
        announce_call("cudnn-trap", "sdpa-cudnn", f"S{length} D64", device)
        yield _cudnn_itself(run, golden, plain, device)


def _cudnn_itself(
    run: Callable[..., list[Tensor]], golden: list[Tensor], plain: list[Tensor], device: torch.device
) -> Finding:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    actual, wrong = attempt(lambda: run(attend, torch.float16), device)
    if actual is None:
        return finding("cudnn-trap", "info", f"cuDNN refuses the call: {wrong}", backend="sdpa-cudnn")
    worst = max(excess(a, p, g, torch.float16) for a, p, g in zip(actual, plain, golden))
    return finding(
        "cudnn-trap", "info", f"cuDNN's error is {worst:.2f} of what is allowed", backend="sdpa-cudnn"
    )


def check_few_key_heads(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """One key head, or few keys of it: on a GPU Triton's dk and dv are then split over queries."""
    cuda = device.type == "cuda"
    shapes = (
        [(16, 2000, 2000, 128), (4, 4100, 100, 64), (16, 1111, 1000, 256)]
        if cuda
        else [(4, INTERPRETED_LENGTH, 17, 32)]
    )
    for name in backends_here(device):
        for heads, seqlen_q, seqlen_k, dim in shapes:
            what = f"H{heads}/1 S{seqlen_q},{seqlen_k} D{dim}"
            announce_call("few-key-heads", name, what, device)
            generator = torch.Generator(device).manual_seed(seed)
            query, dout, key, value = (
                torch.randn(2, *shape, dim, generator=generator, device=device).half()
                for shape in ((heads, seqlen_q), (heads, seqlen_q), (1, seqlen_k), (1, seqlen_k))
            )
            yield _compare(what, [query, key, value], dout, name, check="few-key-heads")


def check_bitwise(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """The same call repeatedly, with other work in between: every bit of out, lse and gradients must be the same."""
    from fastattn import attention

    cuda = device.type == "cuda"
    shapes = [(1, 2, 1, INTERPRETED_LENGTH, 32)]  # the fourth of a GPU's splits dk and dv over queries
    if cuda:
        shapes = [(4, 8, 4, 1024, 64), (2, 8, 4, 2000, 128), (1, 4, 2, 1111, 256), (1, 16, 1, 2000, 128)]
    for name in backends_here(device):
        for batch, heads, kv_heads, length, dim in shapes:
            generator = torch.Generator(device).manual_seed(seed)
            draw = [
                torch.randn(batch, heads, length, dim, generator=generator, device=device).half()
                for _ in range(4)
            ]
            query, key, value, dout = draw
            key, value = key[:, :kv_heads], value[:, :kv_heads]
            leaves = [t.requires_grad_() for t in (query, key, value)]

            def once() -> list[Tensor]:
                out, lse = attention(*leaves, causal=True, return_lse=True, backend=name)  # noqa: B023
                return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]  # noqa: B023

            def repeated() -> tuple[int, int]:
                announce_call("bitwise", name, f"S{length} D{dim}", device)  # noqa: B023
                first, runs, different = once(), 1, 0
                stop = time.monotonic() + seconds / (len(shapes) * 2)
                while time.monotonic() < stop and runs < 1000:
                    if runs % 50 == 0:
                        announce_call("bitwise", name, f"S{length} D{dim}, run {runs}", device)  # noqa: B023
                    # other work, other timing
                    noise = torch.randn(1 + runs * 7919 % 100_000, device=device).sort()
                    different += not all(torch.equal(a, b) for a, b in zip(first, once()))
                    runs += 1
                    del noise
                return different, runs

            found, wrong = attempt(repeated, device)
            if found is None:
                yield refused_or_failed(
                    "bitwise", f"B{batch} H{heads}/{kv_heads} S{length} D{dim}: {wrong}", name
                )
                continue
            different, runs = found
            detail = f"B{batch} H{heads}/{kv_heads} S{length} D{dim}: {different} of {runs} runs differ"
            yield finding("bitwise", "failed" if different else "passed", detail, backend=name, summary=True)


def check_int64_offsets(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Tensors with element offsets beyond 2**31, by strides and by size; the part beyond is compared with float64."""
    if device.type != "cuda":
        yield finding("int64-offsets", "skipped", "needs a GPU: the tensors take 5 GB each")
        return
    for name in (name for name in backends_here(device) if name != "torch"):
        for part in (_wide_strides, _wide_size):
            announce_call("int64-offsets", name, part.__name__.strip("_"), device)
            found, wrong = attempt(lambda: part(device, name, seed), device)  # noqa: B023
            yield found or refused_or_failed("int64-offsets", str(wrong), name)


def _needs_free(device: torch.device, gib: float) -> str | None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    return None if free >= gib else f"needs {gib} GiB free, {free:.1f} are"


def _wide_strides(device: torch.device, name: str, seed: int) -> Finding:
    """Two heads 2**31 elements apart in each of q, k and v."""
    if (reason := _needs_free(device, 16)) is not None:
        return finding("int64-offsets", "skipped", reason, backend=name)
    generator = torch.Generator(device).manual_seed(seed)
    length, dim, apart = 333, 64, 2**31

    def spread_out() -> Tensor:
        storage = torch.empty(apart + length * dim, dtype=torch.float16, device=device)
        tensor = storage.as_strided((1, 2, length, dim), (0, apart, dim, 1))
        tensor.copy_(torch.randn(tensor.shape, generator=generator, device=device))
        return tensor

    operands = [spread_out() for _ in range(3)]
    dout = torch.randn(1, 2, length, dim, generator=generator, device=device).half()
    return _compare("strides past 2**31", operands, dout, name)


def _wide_size(device: torch.device, name: str, seed: int) -> Finding:
    """q, k, v, out and every gradient of 2**31 elements and more; the last sequence is compared."""
    if (reason := _needs_free(device, 48)) is not None:
        return finding("int64-offsets", "skipped", reason, backend=name)
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads, length, dim = 2050, 16, 1024, 64

    def draw() -> Tensor:
        tensor = torch.empty(batch, heads, length, dim, dtype=torch.float16, device=device)
        for start in range(0, batch, 256):
            part = tensor[start : start + 256]
            part.copy_(torch.randn(part.shape, generator=generator, device=device, dtype=torch.float16))
        return tensor

    return _compare("2**31 elements", [draw(), draw(), draw()], draw(), name, part=slice(batch - 1, batch))


def _compare(
    what: str, operands: list[Tensor], dout: Tensor, name: str, part: slice = slice(None),
    check: str = "int64-offsets",
) -> Finding:  # fmt: skip
    from fastattn import attention, reference

    def run(
        attend: Callable[..., Any], tensors: list[Tensor], upstream_grad: Tensor, **extra: Any
    ) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = attend(*leaves, causal=True, **extra)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream_grad)]

    dtype = dout.dtype
    chosen = [t[part] for t in operands]
    golden = run(reference.attention, [t.double() for t in chosen], dout[part].double())
    plain = run(reference.attention, [t.contiguous() for t in chosen], dout[part])
    actual, wrong = attempt(lambda: run(attention, operands, dout, backend=name), dout.device)
    if actual is None:
        return refused_or_failed(check, f"{what}: {wrong}", name)
    worst = max(excess(a[part], p, g, dtype) for a, p, g in zip(actual, plain, golden))
    return finding(
        check,
        "passed" if worst <= 1 else "failed",
        f"{what}: {worst:.2f} of what is allowed",
        backend=name,
    )
