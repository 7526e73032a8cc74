"""Attention against its peers: time, error and peak memory, on the CPU or on a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from inputs.attention import AttentionCall, AttentionInputs
from measure import harness
from measure.protocols import Judgement, Step, Tensors
from peers.attention import find
from report import figures, schema

GRID_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
GRID_TOKENS, GRID_WIDTH = 16384, 2048
CPU_SHAPE: dict[str, Any] = {"batch": 1, "heads": 12, "kv_heads": 12, "head_dim": 64}
GPU_SHAPE: dict[str, Any] = {
    "batch": 4,
    "heads": 16,
    "kv_heads": 16,
    "seqlen_q": 4096,
    "seqlen_k": 4096,
    "head_dim": 128,
    "dtype": torch.bfloat16,
    "direction": "forward+backward",
}


@dataclass(frozen=True)
class AttentionCase(AttentionCall):
    """A call and its providers."""

    def providers(self, device: torch.device) -> list[str]:
        """Names that `peers.attention.find` knows, ours first: each fused backend, unless the case names its peers."""
        if self.peers:
            return ["fastattn", *self.peers]
        ours = [f"fastattn-{name}" for name in _backend_names() if name != "torch"]
        pinned = ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient"]
        formula = ["composite-compile"] if self.group == "features" else []
        return [*ours, *pinned, "flex", *formula, "flash_attn", "xformers"]

    def open(self, device: torch.device) -> AttentionWorkload:
        """Random inputs on the device."""
        return AttentionWorkload(self, device)

    def small(self) -> AttentionCase:
        """The same features on one sequence of no more than 160 positions and two key/value heads."""
        group = self.heads // self.kv_heads
        window = self.window and (min(self.window[0], 63), min(self.window[1], 63))
        return replace(
            self,
            batch=1,
            heads=min(self.kv_heads, 2) * group,
            kv_heads=min(self.kv_heads, 2),
            seqlen_q=min(self.seqlen_q, 160),
            seqlen_k=min(self.seqlen_k, 160),
            window=window,
            target=None,
        )


class AttentionWorkload(AttentionInputs):
    """The inputs of one case, the same for every provider, and the expected results."""

    def step(self, provider: str) -> Step:
        """One forward, backward or both, returning out and the gradients."""
        call = find(provider)(self)
        query, key, value = self.query, self.key, self.value
        inputs = tuple(self.inputs.values())
        names = tuple(self.inputs)

        def forward() -> Tensors:
            with torch.no_grad():
                return {"out": call(query, key, value)}

        def both() -> Tensors:
            out = call(query, key, value)
            return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, inputs, self.dout)))}

        if self.case.direction == "forward":
            return forward
        if self.case.direction == "forward+backward":
            return both
        out = call(query, key, value)

        def backward() -> Tensors:
            return dict(zip(names, torch.autograd.grad(out, inputs, self.dout, retain_graph=True)))

        return backward

    def judge(self, provider: str) -> Judgement | None:
        """Expected results for the first sequence's first key/value head; None for peers with another dropout mask."""
        if self.case.dropout_p and not provider.startswith("fastattn"):
            return None
        return self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        group = self.case.heads // self.case.kv_heads

        def part(name: str, tensor: Tensor) -> Tensor:
            heads = 1 if name in ("dk", "dv") else group
            return tensor[:1, :heads]

        golden = self._reference(part, torch.float64)
        plain = partial(self._reference, part, self.case.dtype)
        return Judgement(part, golden, plain, f"sequence 0, query heads 0..{group - 1}")

    def _reference(self, part: Any, dtype: torch.dtype) -> Tensors:
        from fastattn import reference

        case = self.case
        leaves = {
            n: part(n, t).detach().to(dtype).requires_grad_(self.wants_grad) for n, t in self.inputs.items()
        }
        options = dict(self.options)
        for name in ("mask", "segment_ids"):
            if name in options:
                options[name] = options[name][:1]
        if case.alibi:
            options["alibi_slopes"] = options["alibi_slopes"][: case.heads // case.kv_heads]
        if case.bias:
            options["bias"] = leaves["dbias"]
        out = reference.attention(leaves["dq"], leaves["dk"], leaves["dv"], **options)
        assert isinstance(out, Tensor)
        results = {"out": out.detach()} if case.direction != "backward" else {}
        if self.wants_grad:
            dout = part("out", self.dout).to(dtype)
            results |= dict(zip(leaves, torch.autograd.grad(out, tuple(leaves.values()), dout)))
        return results


def cases_for(device: torch.device) -> list[AttentionCase]:
    """Every case of a device, the most important first."""
    return cpu_cases() if device.type == "cpu" else gpu_cases()


def cpu_cases() -> list[AttentionCase]:
    """Cases for a CPU: dense and masked training shapes, features, low precision, decoding."""

    def make(name: str, group: str, length: int, *more_peers: str, **changes: Any) -> AttentionCase:
        sizes = {"seqlen_q": length, "seqlen_k": length, **CPU_SHAPE, "peers": ("sdpa", *more_peers)}
        return AttentionCase(**{"name": name, "group": group, **sizes, **changes})

    def against_sdpa(speed: float, memory: float | None = None) -> schema.Result:
        return figures.target(speed, "sdpa", memory=memory)

    formula = ("composite", "composite-compile")
    packed = {"documents": 8, "target": against_sdpa(10.0, 0.25)}
    # the target's peer gets the dense mask; SDPA's own causal call, which its users would write, is shown too
    given_mask = {**against_sdpa(1.0, 1.0), "against": "sdpa-dense"}
    grouped = {"causal": True, "heads": 16, "kv_heads": 4, "target": given_mask}
    cases = [
        make("dense-causal-2048", "dense", 2048, causal=True, target=against_sdpa(0.98)),
        make("window-255-8192", "window", 8192, window=(255, 0), target=against_sdpa(13.8, 0.25)),
        make("packed-causal-8192", "packed", 8192, causal=True, **packed),
        make("packed-full-4096", "packed", 4096, **{**packed, "target": None}),
        make("dropout-1024", "features", 1024, dropout_p=0.1, target=against_sdpa(1.0)),
        make("dropout-128", "features", 128, batch=16, heads=12, dropout_p=0.1, target=against_sdpa(1.0)),
        make("dense-full-2048", "dense", 2048),
        make("dense-causal-bf16-2048", "dense", 2048, causal=True, dtype=torch.bfloat16),
        make("gqa-causal-2048", "features", 2048, "sdpa-dense", **grouped),
        make("alibi-causal-2048", "features", 2048, causal=True, alibi=True, target=against_sdpa(1.0, 1.0)),
        make("softcap-causal-2048", "features", 2048, *formula, "flex", causal=True, softcap=30.0),
        make("bias-grad-1024", "features", 1024, bias=True, target=against_sdpa(1.0, 1.0)),
        make("random-mask-2048", "features", 2048, random_mask=True, target=against_sdpa(1.0, 1.0)),
    ]
    cases += [make(f"dense-causal-{s}", "dense", s, causal=True) for s in (512, 1024, 4096)]
    cases += [make(f"window-255-{s}", "window", s, window=(255, 0)) for s in (1024, 2048, 4096)]
    flex = make("flex-window-1024", "features", 1024, "flex", window=(255, 0), direction="forward")
    return [*cases, flex]


def gpu_cases() -> list[AttentionCase]:
    """The forward and backward grids at 16k tokens and hidden size 2048, then features that peers share."""
    cases = []
    for direction in ("forward", "backward"):
        for head_dim in (128, 64, 256):
            for causal in (True, False):
                cases += [
                    _grid_case(direction, head_dim, causal, length) for length in reversed(GRID_LENGTHS)
                ]
    features: dict[str, dict[str, Any]] = {
        "bias-grad": {"bias": True, "batch": 1},
        "dropout": {"dropout_p": 0.125},
        "random-mask": {"random_mask": True},
        "alibi": {"causal": True, "alibi": True},
        "softcap": {"causal": True, "softcap": 30.0},
        "window": {"window": (1023, 0)},
        "packed": {"causal": True, "documents": 4},
        "gqa": {"causal": True, "kv_heads": 2},
        "mqa-1x8192": {
            "causal": True,
            "batch": 1,
            "heads": 32,
            "kv_heads": 1,
            "seqlen_q": 8192,
            "seqlen_k": 8192,
            "direction": "backward",
        },
        "fp32": {"causal": True, "dtype": torch.float32, "head_dim": 64},
        "fp16": {"causal": True, "dtype": torch.float16},
    }
    cases += [
        AttentionCase(name=f"feature-{n}", group="features", **{**GPU_SHAPE, **f})
        for n, f in features.items()
    ]
    return cases


def _grid_case(direction: str, head_dim: int, causal: bool, length: int) -> AttentionCase:
    heads = GRID_WIDTH // head_dim
    return AttentionCase(
        name=f"{direction}-{'causal' if causal else 'full'}-d{head_dim}-s{length}",
        group=direction,
        batch=GRID_TOKENS // length,
        heads=heads,
        kv_heads=heads,
        seqlen_q=length,
        seqlen_k=length,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        direction=direction,
        causal=causal,
    )


def _backend_names() -> list[str]:
    try:
        from fastattn import backends
    except ImportError:
        return ["auto"]
    return [backend.NAME for backend in backends.BACKENDS]


def import_case(quick: bool) -> schema.Result:
    """Milliseconds to import torch, and fastattn after torch, each in fresh processes, interleaved."""
    rounds = 2 if quick else 5
    place = schema.ROOT if (schema.ROOT / "pyproject.toml").exists() else None
    programs = {"torch": "import torch", "fastattn": "import fastattn"}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, statement in programs.items():
            before = "import torch;" if name == "fastattn" else ""
            timed = f"from time import perf_counter as t;{before}a=t();{statement};print(t()-a)"
            done = subprocess.run(
                [sys.executable, "-c", timed],
                capture_output=True,
                text=True,
                cwd=place,
                check=False,
                timeout=300,
            )
            if done.returncode == 0 and number > 0:  # the first round fills the file cache
                seconds[name].append(float(done.stdout))
    rows = []
    for name, samples in seconds.items():
        if samples:
            rows.append(harness.timed_row(name, samples))
        else:
            rows.append({"provider": name, "status": "failed", "reason": "the import failed"})
    return {
        "name": "import",
        "group": "import",
        "params": {"fastattn": "time beyond torch's"},
        "direction": "import",
        "dtype": "none",
        "label": "`import fastattn` after `import torch`",
        "axis": None,
        "flops": None,
        "bytes": None,
        "target": {"provider": "fastattn", "against": None, "extra_ms": 150.0},
        "rows": rows,
    }
