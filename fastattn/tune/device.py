"""Runs tiles on this machine's device: checks their results and measures their time."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends.triton import attention as triton_attention
from fastattn.backends.triton import varlen as triton_varlen
from fastattn.kernels.tiles import Tile, Tiles, table_tiles
from fastattn.ops.arguments import call_arguments
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded, VarlenCall
from fastattn.tune.plan import DTYPES, Work

RESULTS = {"forward": ("out", "lse"), "dkdv": ("key", "value"), "dq": ("query",), "dbias": ("bias",)}
SAMPLE_SECONDS = 0.003  # shorter steps are repeated within a sample
SMALL_MEMORY = 24 * 2**30  # bytes of memory up to which a device gets the smaller timing shape

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the calls that are run; of packed sequences, the sum of the lengths is batch * seqlen."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int


CHECKED = Shape(1, 2, 1, 577, 641)  # several blocks long, not a multiple of any block size


def timed(work: Work, memory: int) -> Shape:
    """A training step's shape: 8192 tokens of width 2048, or half of that on a small device."""
    heads = max(2048 // work.head_dim, 1)
    batch = 1 if memory < SMALL_MEMORY else 2
    return Shape(batch, heads, heads, 4096, 4096)


@dataclass
class Inputs:
    """The tensors of one kind of call, its options by their public names, and the upstream gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor
    cu_seqlens: Tensor | None = None  # of packed sequences, (B + 1,) int32

    @classmethod
    def of(cls, work: Work, shape: Shape, device: torch.device) -> Inputs:
        """Normal operands from one seed."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[work.dtype]

        def normal(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        lead_q: tuple[int, ...] = (shape.batch, shape.heads, shape.seqlen_q)
        lead_k: tuple[int, ...] = (shape.batch, shape.kv_heads, shape.seqlen_k)
        cu_seqlens = None
        if work.packed:
            tokens = shape.batch * shape.seqlen_q
            lead_q, lead_k = (tokens, shape.heads), (tokens, shape.kv_heads)
            cu_seqlens = torch.tensor([0, tokens // 7, tokens // 7, tokens // 2, tokens], device=device).int()
        lse_shape = lead_q[::-1] if work.packed else lead_q
        return cls(
            normal(*lead_q, work.head_dim),
            normal(*lead_k, work.head_dim),
            normal(*lead_k, work.value_dim),
            _options(work, shape, normal, generator),
            normal(*lead_q, work.value_dim),
            normal(*lse_shape, dtype=torch.float32),
            cu_seqlens,
        )

    def call(self) -> AttentionCall:
        """The call as a backend gets it; packed tokens as one sequence."""
        if self.cu_seqlens is None:
            return AttentionCall(*call_arguments(self.query, self.key, self.value, **self.options))
        one = (t.transpose(0, 1)[None] for t in (self.query, self.key, self.value))
        return AttentionCall(*call_arguments(*one, **self.options))

    def packed_call(self, cu_seqlens: Tensor) -> VarlenCall:
        """The same for packed sequences."""
        call = self.call()
        shared = ("alibi_slopes", "sinks", "dropout_seed", "causal", "window_left", "window_right", "softcap",
                  "dropout_p", "scale")  # fmt: skip
        options = {name: getattr(call, name) for name in shared}
        longest = self.query.shape[0]
        return VarlenCall(
            self.query, self.key, self.value, cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
            **options,
        )  # fmt: skip

    def expected(self, work: Work, dtype: torch.dtype) -> Tensors:
        """The expected results: the reference with every float tensor in `dtype`."""
        leaves = {name: getattr(self, name).to(dtype) for name in ("query", "key", "value")}
        options = dict(self.options)
        if "bias" in options:
            leaves["bias"] = options["bias"].to(dtype)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        options |= {name: leaf for name, leaf in leaves.items() if name in options}
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        if self.cu_seqlens is None:
            out, lse = reference.attention(query, key, value, **options, return_lse=True)
        else:
            options |= {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens}
            out, lse = reference.attention_varlen(query, key, value, **options, return_lse=True)
        if work.kernel == "forward":
            return {"out": out.detach(), "lse": lse.detach()}
        wanted = RESULTS[work.kernel]
        grads = torch.autograd.grad(
            (out, lse), [leaves[name] for name in wanted], (self.dout.to(dtype), self.dlse.to(dtype))
        )
        return dict(zip(wanted, grads))


def _options(
    work: Work, shape: Shape, normal: Callable[..., Tensor], generator: torch.Generator
) -> dict[str, Any]:
    """The options of the features."""
    device, (sq, sk) = generator.device, (shape.seqlen_q, shape.seqlen_k)
    lengths = torch.full((shape.batch,), sk - sk // 8, device=device, dtype=torch.int32)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "causal": lambda: {"causal": True},
        "window": lambda: {"window": (sk // 8, None)},
        "lengths": lambda: {"key_lengths": lengths},
        "sinks": lambda: {"sinks": normal(shape.heads, dtype=torch.float32)},
        "alibi": lambda: {"alibi_slopes": normal(shape.heads, dtype=torch.float32).abs()},
        "softcap": lambda: {"softcap": 15.0},
        "bias": lambda: {"bias": normal(1, shape.heads, sq, sk)},
        "mask": lambda: {"mask": normal(1, 1, sq, sk) > -1.3},
        "segments": lambda: {"segment_ids": (_segments(shape, sq, device), _segments(shape, sk, device))},
        "dropout": lambda: {"dropout_p": 0.1, "dropout_seed": 17},
        "packed": dict,
    }
    options: dict[str, Any] = {}
    for feature in work.features:
        options |= makers[feature]()
    return options


def _segments(shape: Shape, length: int, device: torch.device) -> Tensor:
    """Four documents, one after another."""
    ids = torch.arange(length, device=device, dtype=torch.int32) * 4 // length
    return ids.expand(shape.batch, -1).contiguous()


class Device:
    """One device; inputs and expected results are computed once for each kind of call."""

    def __init__(self, device: torch.device, arch: int, checked: Shape = CHECKED) -> None:
        self.device, self.arch, self.checked = device, arch, checked
        self.inputs = functools.lru_cache(maxsize=2)(self._inputs)
        self.residuals = functools.lru_cache(maxsize=2)(self._residuals)
        self.expected = functools.lru_cache(maxsize=2)(self._expected)
        self.memory = SMALL_MEMORY
        if device.type == "cuda":
            self.memory = torch.cuda.get_device_properties(device).total_memory

    def _inputs(self, work: Work, shape: Shape) -> Inputs:
        return Inputs.of(work, shape, self.device)

    def _expected(self, work: Work) -> tuple[Tensors, Tensors]:
        """(float64, plain torch in the dtype) of the checked shape."""
        inputs = self.inputs(_any_kernel(work), self.checked)
        return inputs.expected(work, torch.float64), inputs.expected(work, DTYPES[work.dtype])

    def step(self, work: Work, tile: Tile, shape: Shape) -> Callable[[], Tensors]:
        """A function that calls one kernel with a tile, and the kernels it depends on."""
        inputs = self.inputs(_any_kernel(work), shape)
        needs = GradsNeeded(
            query=work.kernel == "dq", key=work.kernel == "dkdv", value=work.kernel == "dkdv",
            bias=work.kernel == "dbias",
        )  # fmt: skip
        run_forward, run_backward, call = _entry_points(inputs)
        chosen = replace(self._tiles(inputs), **{work.kernel: tile})
        if work.kernel == "forward":
            spec = AttentionSpec.of(inputs.call())
            return lambda: dict(zip(("out", "lse"), run_forward(spec, call, chosen)))
        spec = AttentionSpec.of(inputs.call(), needs)
        out, lse = self.residuals(_any_kernel(work), shape)

        def step() -> Tensors:
            grads = run_backward(spec, call, out, lse, inputs.dout, inputs.dlse, needs, chosen)
            return {name: getattr(grads, name) for name in RESULTS[work.kernel]}

        return step

    def _residuals(self, work: Work, shape: Shape) -> tuple[Tensor, Tensor]:
        """(out, lse) of the forward with built-in tiles, inputs of the backward passes."""
        inputs = self.inputs(work, shape)
        run_forward, _, call = _entry_points(inputs)
        out, lse = run_forward(AttentionSpec.of(inputs.call()), call, self._tiles(inputs))
        return out, lse

    def _tiles(self, inputs: Inputs) -> Tiles:
        return table_tiles(AttentionSpec.of(inputs.call()).replace(arch=self.arch))

    def verdict(self, work: Work, tile: Tile) -> str | None:
        """Why a tile cannot be used, because it fails or is wrong; None if it is correct."""
        golden, plain = self.expected(work)
        try:
            actual = self.step(work, tile, self.checked)()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        return next(
            (
                reason
                for name in golden
                if (reason := over_rule(actual[name], plain[name], golden[name], name)) is not None
            ),
            None,
        )

    def seconds(self, work: Work, tile: Tile) -> float:
        """One sample of a tile's time per call on a large shape."""
        step = self.step(work, tile, timed(work, self.memory))
        step()
        once = self._sample(step, 1)
        return self._sample(step, max(1, min(100, int(SAMPLE_SECONDS / max(once, 1e-6)))))

    def _sample(self, step: Callable[[], Tensors], repeats: int) -> float:
        if self.device.type != "cuda":
            begun = time.perf_counter()
            for _ in range(repeats):
                step()
            return (time.perf_counter() - begun) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats


def _any_kernel(work: Work) -> Work:
    """The arguments shared by all kernels on a kind of call."""
    return replace(work, kernel="forward")


def _entry_points(
    inputs: Inputs,
) -> tuple[Callable[..., Any], Callable[..., Any], AttentionCall | VarlenCall]:
    """(forward, backward, the call they take)."""
    if inputs.cu_seqlens is None:
        return triton_attention.attention_fwd, triton_attention.attention_bwd, inputs.call()
    return triton_varlen.varlen_fwd, triton_varlen.varlen_bwd, inputs.packed_call(inputs.cu_seqlens)


def over_rule(actual: Tensor, plain: Tensor, golden: Tensor, name: str) -> str | None:
    """A message if max |actual - golden| exceeds 2 max |plain - golden| + eps max |golden|, or None."""
    eps = torch.finfo(plain.dtype).eps
    actual, plain, golden = (t.detach().double() for t in (actual, plain, golden))
    finite = golden.isfinite()
    if not torch.equal(actual[~finite], golden[~finite]):
        return f"wrong: {name} differs where the reference is infinite"
    error = (actual - golden)[finite].abs().max().item() if finite.any() else 0.0
    allowed = 0.0
    if finite.any():
        allowed = 2 * (plain - golden)[finite].abs().max().item() + eps * golden[finite].abs().max().item()
    return None if error <= allowed else f"wrong: {name} is off by {error:.3g}, allowed {allowed:.3g}"


@functools.cache
def _device_of_process(arch: int) -> Device:
    return Device(torch.device("cuda"), arch)


def verdict_in_process(arch: int, work: Work, tile: Tile) -> str | None:
    """`Device.verdict` in a worker process, which exits if a kernel made its CUDA context unusable."""
    verdict = _device_of_process(arch).verdict(work, tile)
    if verdict is not None and "CUDA error" in verdict:
        os._exit(1)
    return verdict
