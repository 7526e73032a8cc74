"""Correctness of fastattn on the device at hand: random calls against float64, known traps, repetition, huge offsets.

    python benchmarks/gpu_checks.py random --seconds 60 --seed 3      one check
    python benchmarks/gpu_checks.py                                   all of them
Every check prints one JSON object per line, the last line of a check being its summary. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import checkout
import gpu_op_checks
import torch
from cache_calls import CacheCall
from judging import SLACK, Finding, backends_here, excess, finding
from torch import Tensor

SEQUENCES = (1, 2, 15, 17, 63, 64, 65, 113, 127, 128, 129, 191, 200, 255, 257, 384, 511, 520, 1000, 1023)
HEAD_DIMS = (1, 8, 16, 17, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 200, 256)
CALLS_PER_KIND = 16
SMALL = 70  # the greatest length where Triton is interpreted


class RandomCall:
    """A call drawn from a seed: sizes, dtype, strides and any mixture of features.

    Every CALLS_PER_KIND seeds share what kernels are compiled for (dtype, head dims, features) and differ in the rest.
    """

    def __init__(self, seed: int, device: torch.device, longest: int) -> None:
        self.draw, self.kind = random.Random(seed), random.Random(seed // CALLS_PER_KIND)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        draw, kind = self.draw, self.kind
        lengths = [length for length in SEQUENCES if length <= longest]
        self.kv_heads, group = draw.choice([1, 2, 3]), kind.choice([1, 1, 2, 4])
        self.batch, self.heads = draw.choice([1, 2, 3]), self.kv_heads * group
        self.seqlen_q, self.seqlen_k = draw.choice(lengths), draw.choice(lengths)
        if draw.random() < 0.4:
            self.seqlen_k = self.seqlen_q
        self.head_dim = kind.choice(HEAD_DIMS)
        self.value_dim = self.head_dim if kind.random() < 0.7 else kind.choice(HEAD_DIMS)
        self.dtype = kind.choice([torch.float16, torch.bfloat16, torch.bfloat16, torch.float32])
        self.rows_first = draw.random() < 0.5  # (B, S, H, D) in memory
        self.options = self._options()
        self.operands = {
            "query": self._operand(self.heads, self.seqlen_q, self.head_dim),
            "key": self._operand(self.kv_heads, self.seqlen_k, self.head_dim),
            "value": self._operand(self.kv_heads, self.seqlen_k, self.value_dim),
        }
        self.dout = self._normal(self.batch, self.heads, self.seqlen_q, self.value_dim).to(self.dtype)
        self.dlse = self._normal(self.batch, self.heads, self.seqlen_q)

    def describe(self) -> str:
        """The call in a line."""
        shape = f"B{self.batch} H{self.heads}/{self.kv_heads} S{self.seqlen_q},{self.seqlen_k}"
        shape += f" D{self.head_dim},{self.value_dim}"
        layout = "bshd" if self.rows_first else "bhsd"
        features = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return f"{shape} {str(self.dtype)[6:]} {layout} {features}"

    def run(self, attend: Callable[..., Any], dtype: torch.dtype, **extra: Any) -> dict[str, Tensor]:
        """out, lse and the gradient of every differentiable input, from cotangents of out and lse."""
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in self.operands.items()}
        options = dict(self.options)
        for name in {"bias", "alibi_slopes", "sinks"} & options.keys():
            kept = dtype if dtype == torch.float64 else options[name].dtype
            options[name] = leaves[name] = options[name].detach().to(kept).requires_grad_()
        out, lse = attend(
            *(leaves[n] for n in ("query", "key", "value")), **options, return_lse=True, **extra
        )
        grads = torch.autograd.grad(
            (out, lse),
            tuple(leaves.values()),
            (self.dout.to(out.dtype), self.dlse.to(lse.dtype)),
            allow_unused=True,
        )
        results = {"out": out.detach(), "lse": lse.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads):
            results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
        return results

    def _options(self) -> dict[str, Any]:
        draw, kind = self.draw, self.kind
        options: dict[str, Any] = {"causal": kind.choice([False, True, True, "top_left"])}
        if kind.random() < 0.3:
            options["window"] = (draw.choice([0, 5, 40, 130]), kind.choice([0, 70, None]))
        if kind.random() < 0.25:
            options["key_lengths"] = self._integers(0, self.seqlen_k + 1, self.batch)
        if kind.random() < 0.5:  # half the calls keep to what every backend has
            return options
        for name, chance in (("mask", 0.25), ("bias", 0.3)):
            if kind.random() < chance:
                shape = [size if draw.random() < 0.6 else 1 for size in self._plane()]
                noise = self._normal(*shape)
                options[name] = noise > -1.3 if name == "mask" else noise
        if kind.random() < 0.3:
            options["segment_ids"] = tuple(self._integers(-1, 3, self.batch, n) for n in self._plane()[2:])
        if kind.random() < 0.25:
            options["alibi_slopes"] = self._normal(self.heads).abs()
        if kind.random() < 0.25:
            options["softcap"] = 2.0
        if kind.random() < 0.25:
            options["sinks"] = self._normal(self.heads)
        if kind.random() < 0.25:
            options |= {"dropout_p": 0.2, "dropout_seed": draw.randrange(1 << 40)}
        return options

    def _plane(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.seqlen_q, self.seqlen_k

    def _operand(self, heads: int, length: int, dim: int) -> Tensor:
        if self.rows_first:
            return self._normal(self.batch, length, heads, dim).transpose(1, 2).to(self.dtype)
        return self._normal(self.batch, heads, length, dim).to(self.dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)


def check_random(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Random calls, forward and backward with a gradient into lse, each backend that accepts them."""
    from fastattn import attention

    yield from _judge("random", RandomCall, attention, device, seconds, seed)


def check_kv_cache(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Random calls against a cache, and what is in the cache afterwards, each backend that accepts them."""
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
    """Drawn calls of an op against the reference in float64, for some time."""
    from fastattn import reference

    names = backends_here(device)
    counts: Counter[tuple[str, str]] = Counter()
    worst: dict[str, float] = dict.fromkeys(names, 0.0)
    longest = SEQUENCES[-1] if device.type == "cuda" else SMALL
    stop = time.monotonic() + seconds
    number = 0
    while time.monotonic() < stop:
        call = draw(seed + number, device, longest)
        number += 1
        golden = call.run(reference.attention, torch.float64)
        plain = call.run(reference.attention, call.dtype)
        for name in names:
            try:
                actual = call.run(op, call.dtype, backend=name)
                ratios = {key: excess(actual[key], plain[key], golden[key], call.dtype) for key in golden}
            except RuntimeError as error:
                if "cannot run this call" in str(error):
                    counts[name, "refused"] += 1
                    continue
                counts[name, "failed"] += 1
                yield finding(
                    check, "failed", f"{error} in {call.describe()}", backend=name, seed=seed + number - 1
                )
                if device.type == "cuda":
                    torch.cuda.synchronize()  # an illegal access ends this process here, not in an unrelated call
                continue
            top = max(ratios, key=lambda key: ratios[key])
            worst[name] = max(worst[name], ratios[top])
            good = ratios[top] <= SLACK
            counts[name, "passed" if good else "failed"] += 1
            counts[name, "over"] += 1 < ratios[top] <= SLACK
            if not good:
                detail = f"{top} at {ratios[top]:.3g} of what is allowed: {call.describe()}"
                yield finding(check, "failed", detail, backend=name, seed=seed + number - 1)
    for name in names:
        passed, failed, refused = (counts[name, kind] for kind in ("passed", "failed", "refused"))
        status = "failed" if failed else "passed" if passed else "skipped"
        detail = f"{passed} passed ({counts[name, 'over']} of them over the rule), {failed} failed, {refused} refused"
        detail += f"; worst {worst[name]:.2f} of what is allowed"
        yield finding(check, status, detail, backend=name, summary=True)


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
        try:
            actual = run(attention, torch.float16, backend=name)
        except RuntimeError as error:
            yield finding("cudnn-trap", "skipped", str(error), backend=name)
            continue
        worst = max(excess(a, p, g, torch.float16) for a, p, g in zip(actual, plain, golden))
        yield finding(
            "cudnn-trap",
            "passed" if worst <= 1 else "failed",
            f"{worst:.2f} of what is allowed",
            backend=name,
        )
    if device.type == "cuda":
        yield _cudnn_itself(run, golden, plain)


def _cudnn_itself(run: Callable[..., list[Tensor]], golden: list[Tensor], plain: list[Tensor]) -> Finding:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    try:
        actual = run(attend, torch.float16)
    except RuntimeError as error:
        return finding("cudnn-trap", "info", f"cuDNN refuses the call: {error}", backend="sdpa-cudnn")
    worst = max(excess(a, p, g, torch.float16) for a, p, g in zip(actual, plain, golden))
    return finding(
        "cudnn-trap", "info", f"cuDNN's error is {worst:.2f} of what is allowed", backend="sdpa-cudnn"
    )


def check_bitwise(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """The same call again and again, with other work in between: every bit of out, lse and gradients the same."""
    from fastattn import attention

    cuda = device.type == "cuda"
    shapes = [(4, 8, 1024, 64), (2, 8, 2000, 128), (1, 4, 1111, 256)] if cuda else [(1, 2, SMALL, 32)]
    for name in backends_here(device):
        for batch, heads, length, dim in shapes:
            generator = torch.Generator(device).manual_seed(seed)
            draw = [
                torch.randn(batch, heads, length, dim, generator=generator, device=device).half()
                for _ in range(4)
            ]
            query, key, value, dout = draw
            key, value = key[:, : heads // 2], value[:, : heads // 2]
            leaves = [t.requires_grad_() for t in (query, key, value)]

            def once() -> list[Tensor]:
                out, lse = attention(*leaves, causal=True, return_lse=True, backend=name)  # noqa: B023
                return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]  # noqa: B023

            first, runs, different = once(), 1, 0
            stop = time.monotonic() + seconds / (len(shapes) * 2)
            while time.monotonic() < stop and runs < 1000:
                noise = torch.randn(
                    1 + runs * 7919 % 100_000, device=device
                ).sort()  # other work, other timing
                different += not all(torch.equal(a, b) for a, b in zip(first, once()))
                runs += 1
                del noise
            detail = f"B{batch} H{heads} S{length} D{dim}: {different} of {runs} runs differ"
            yield finding("bitwise", "failed" if different else "passed", detail, backend=name, summary=True)


def check_wide_offsets(device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    """Tensors whose element offsets pass 2**31, by strides and by size, against float64 on what lies beyond."""
    if device.type != "cuda":
        yield finding("wide-offsets", "skipped", "needs a GPU: the tensors take 5 GB each")
        return
    for name in (name for name in backends_here(device) if name != "torch"):
        yield _wide_strides(device, name, seed)
        yield _wide_size(device, name, seed)


def _needs_free(device: torch.device, gib: float) -> str | None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    return None if free >= gib else f"needs {gib} GiB free, {free:.1f} are"


def _wide_strides(device: torch.device, name: str, seed: int) -> Finding:
    """Two heads 2**31 elements apart in each of q, k and v."""
    if (reason := _needs_free(device, 16)) is not None:
        return finding("wide-offsets", "skipped", reason, backend=name)
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
        return finding("wide-offsets", "skipped", reason, backend=name)
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
    what: str, operands: list[Tensor], dout: Tensor, name: str, part: slice = slice(None)
) -> Finding:
    from fastattn import attention, reference

    def run(
        attend: Callable[..., Any], tensors: list[Tensor], cotangent: Tensor, **extra: Any
    ) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = attend(*leaves, causal=True, **extra)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

    dtype = dout.dtype
    chosen = [t[part] for t in operands]
    golden = run(reference.attention, [t.double() for t in chosen], dout[part].double())
    plain = run(reference.attention, [t.contiguous() for t in chosen], dout[part])
    try:
        actual = run(attention, operands, dout, backend=name)
    except RuntimeError as error:
        return finding("wide-offsets", "failed", f"{what}: {error}", backend=name)
    worst = max(excess(a[part], p, g, dtype) for a, p, g in zip(actual, plain, golden))
    return finding(
        "wide-offsets",
        "passed" if worst <= 1 else "failed",
        f"{what}: {worst:.2f} of what is allowed",
        backend=name,
    )


CHECKS: dict[str, Callable[[torch.device, float, int], Iterator[Finding]]] = {
    "random": check_random,
    "kv-cache": check_kv_cache,
    "ops": gpu_op_checks.check_ops,
    "cudnn-trap": check_cudnn_trap,
    "bitwise": check_bitwise,
    "wide-offsets": check_wide_offsets,
}


def in_workers(check: str, options: argparse.Namespace) -> Iterator[Finding]:
    """The findings of a check run in several processes, each from seeds of its own: kernels compile side by side."""
    command = [
        sys.executable,
        __file__,
        check,
        "--seconds",
        str(options.seconds),
        "--device",
        options.device,
        "--seed",
    ]
    workers = [
        subprocess.Popen([*command, str(options.seed + 100_000 * number)], stdout=subprocess.PIPE, text=True)
        for number in range(options.workers)
    ]
    for number, worker in enumerate(workers):
        output, _ = worker.communicate()
        findings = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        yield from findings
        if worker.returncode and not any(item["status"] == "failed" for item in findings):
            yield finding(check, "failed", f"worker {number} ended with status {worker.returncode}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Correctness of fastattn on this machine's device.")
    parser.add_argument("check", nargs="*", help=f"which checks: {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the checks that repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes for the random calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    unknown = [name for name in options.check if name not in CHECKS]
    if unknown:
        parser.error(f"unknown check {unknown[0]!r}: choose from {', '.join(CHECKS)}")
    checkout.make_importable()
    checkout.correct_interpreter()
    failed = False
    for name in options.check or CHECKS:
        spread = name in ("random", "kv-cache") and options.workers > 1
        run = CHECKS[name](torch.device(options.device), options.seconds, options.seed)
        for item in in_workers(name, options) if spread else run:
            print(json.dumps(item), flush=True)
            failed = failed or item["status"] == "failed"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
