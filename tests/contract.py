"""The contract as cases: one attention call per clause, with everything needed to run it on any backend and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from numerics import assert_each_within_rule, terms_of_score_gradients

Options = dict[str, Any]


class Maker:
    """Tensors of one case, from its own seed and always made on the CPU, so that every device gets the same."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def chance(self, p: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; options that hold tensors are a function of a Maker."""

    name: str
    options: Callable[[Maker], Options] = field(default=lambda make: {})
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    seqlen_q: int = 70
    seqlen_k: int = 83
    head_dim: int = 16
    value_dim: int = 16
    layout: str = "bhsd"  # or "bshd": how the operands lie in memory
    one_key: bool = (
        False  # every query sees one key, whose weight is 1 whatever its score: the terms of dscore cancel
    )

    def __str__(self) -> str:
        return self.name


def _bias_with_holes(make: Maker) -> Tensor:
    return make.normal(70, 83).masked_fill(make.chance(0.4, 70, 83), -torch.inf)


def _packed(lengths: Sequence[int], device: str) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


CASES = (
    Case("plain"),
    Case("one head, one query", heads=1, kv_heads=1, seqlen_q=1),
    Case("causal", lambda make: {"causal": True}),
    Case("causal square", lambda make: {"causal": True}, seqlen_q=83),
    Case("causal, more queries than keys", lambda make: {"causal": True}, seqlen_q=90),
    Case("causal top left", lambda make: {"causal": "top_left"}),
    Case("causal top left, more queries", lambda make: {"causal": "top_left"}, seqlen_q=90),
    Case("causal, one query", lambda make: {"causal": True}, seqlen_q=1),
    Case("window both sides", lambda make: {"window": (9, 4)}),
    Case("window left only", lambda make: {"window": (9, None)}),
    Case("window right only", lambda make: {"window": (-1, 4)}),
    Case("window of one key", lambda make: {"window": (0, 0)}, one_key=True),
    Case("window and causal", lambda make: {"window": (9, 4), "causal": True}),
    Case("window and top left", lambda make: {"window": (9, 4), "causal": "top_left"}, seqlen_q=140),
    Case("window over many tiles", lambda make: {"window": (200, 0)}, batch=1, heads=2, kv_heads=1,
         seqlen_q=700, seqlen_k=710),
    Case("causal over many tiles", lambda make: {"causal": True, "softcap": 5.0}, batch=1, heads=2, kv_heads=1,
         seqlen_q=300, seqlen_k=1100),
    Case("grouped heads", lambda make: {"causal": True}, kv_heads=2),
    Case("one key head", kv_heads=1),
    Case("wider values", lambda make: {"causal": True}, value_dim=24),
    Case("narrower values", head_dim=20, value_dim=7),
    Case("head dim 1", head_dim=1, value_dim=1),
    Case("head dim 59", head_dim=59, value_dim=59),
    Case("head dim 256", head_dim=256, value_dim=256, seqlen_q=20, seqlen_k=30),
    Case("batch, length, heads, dim in memory", lambda make: {"causal": True}, layout="bshd"),
    Case("custom scale", lambda make: {"scale": 0.3}),
    Case("negative scale", lambda make: {"scale": -0.3}),
    Case("negative scale, causal", lambda make: {"scale": -0.3, "causal": True}),
    Case("scale of zero", lambda make: {"scale": 0.0, "causal": True}),
    Case("mask", lambda make: {"mask": make.chance(0.7, 2, 4, 70, 83)}),
    Case("mask of keys", lambda make: {"mask": make.chance(0.7, 2, 1, 1, 83)}),
    Case("mask of rank 2", lambda make: {"mask": make.chance(0.7, 70, 83), "causal": True}),
    Case("mask with empty rows", lambda make: {"mask": make.chance(0.02, 70, 83)}),
    Case("mask of one bool", lambda make: {"mask": make.chance(2.0)}),
    Case("bias", lambda make: {"bias": make.normal(2, 4, 70, 83)}),
    Case("bias per head", lambda make: {"bias": make.normal(4, 70, 83), "causal": True}),
    Case("bias per key", lambda make: {"bias": make.normal(83)}, kv_heads=2),
    Case("bias per query", lambda make: {"bias": make.normal(2, 1, 70, 1)}),
    Case("bias of one number", lambda make: {"bias": make.normal()}),
    Case("bias with -inf", lambda make: {"bias": _bias_with_holes(make)}),
    Case("bias and mask", lambda make: {"bias": make.normal(70, 83), "mask": make.chance(0.5, 2, 1, 70, 83)}),
    Case("segments", lambda make: {"segment_ids": _packed([20, 1, 30, 19], make.device).expand(2, -1)},
         seqlen_k=70),
    Case("segments and causal", lambda make: {"segment_ids": _packed([20, 40, 10], make.device).expand(2, -1),
         "causal": True}, seqlen_k=70),
    Case("unsorted and negative segments", lambda make: {
        "segment_ids": (make.integers(-1, 3, 2, 70), make.integers(-1, 3, 2, 83))}),
    Case("short segments", lambda make: {"segment_ids": (torch.arange(300, device=make.device) // 7)[None]},
         batch=1, heads=1, kv_heads=1, seqlen_q=300, seqlen_k=300),
    Case("segments, window and bias", lambda make: {"segment_ids": _packed([20, 40, 10], make.device).expand(2, -1),
         "window": (12, 3), "bias": make.normal(4, 70, 70)}, seqlen_k=70),
    Case("lengths", lambda make: {"key_lengths": torch.tensor([83, 31], device=make.device)}),
    Case("lengths and causal", lambda make: {"key_lengths": torch.tensor([40, 7], device=make.device),
         "causal": True}),
    Case("a length of zero", lambda make: {"key_lengths": torch.tensor([0, 50], device=make.device)}),
    Case("alibi", lambda make: {"alibi_slopes": make.normal(4).abs()}),
    Case("alibi per batch, top left", lambda make: {"alibi_slopes": make.normal(2, 4).abs(),
         "causal": "top_left"}, kv_heads=2),
    Case("softcap", lambda make: {"softcap": 1.5, "causal": True}),
    Case("softcap and bias", lambda make: {"softcap": 1.5, "bias": make.normal(4, 1, 83)}),
    Case("sinks", lambda make: {"sinks": make.normal(4), "causal": True}),
    Case("sinks alone", lambda make: {"sinks": make.normal(4), "mask": make.chance(0.02, 70, 83)}),
    Case("dropout", lambda make: {"dropout_p": 0.3, "dropout_seed": 11}),
    Case("dropout over many tiles", lambda make: {"dropout_p": 0.1, "dropout_seed": -5, "causal": True}, batch=1,
         heads=2, kv_heads=1, seqlen_q=150, seqlen_k=600),
    Case("no queries", seqlen_q=0),
    Case("no keys", seqlen_k=0),
    Case("no keys but sinks", lambda make: {"sinks": make.normal(4)}, seqlen_k=0),
    Case("no batch", lambda make: {"causal": True}, batch=0),
    Case("everything", lambda make: {
        "causal": True, "window": (40, None), "mask": make.chance(0.9, 2, 1, 70, 83), "bias": make.normal(4, 1, 83),
        "segment_ids": (torch.arange(70, device=make.device).expand(2, -1) // 40,
                        torch.arange(83, device=make.device).expand(2, -1) // 45),
        "key_lengths": torch.tensor([83, 60], device=make.device), "alibi_slopes": make.normal(2, 4).abs(),
        "softcap": 3.0, "sinks": make.normal(4), "dropout_p": 0.2, "dropout_seed": 3, "scale": 0.4},
        kv_heads=2, value_dim=24),
)  # fmt: skip

SAMPLES = 8  # inputs of a float32 case
DIFFERENTIABLE_OPTIONS = ("bias", "alibi_slopes", "sinks")


@dataclass
class Inputs:
    """The operands of a case, its options, and the gradients that come in from above; all in float32 values."""

    case: Case
    operands: dict[str, Tensor]
    options: Options
    dout: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh inputs, rounded to `dtype` so that every precision starts from the same numbers."""
        make = Maker(device, 1000 * seed + sum(map(ord, case.name)))
        c = case

        def operand(heads: int, length: int, dim: int) -> Tensor:
            if c.layout == "bshd":
                return make.normal(c.batch, length, heads, dim).transpose(1, 2).to(dtype)
            return make.normal(c.batch, heads, length, dim).to(dtype)

        operands = {
            "query": operand(c.heads, c.seqlen_q, c.head_dim),
            "key": operand(c.kv_heads, c.seqlen_k, c.head_dim),
            "value": operand(c.kv_heads, c.seqlen_k, c.value_dim),
        }
        dout = make.normal(c.batch, c.heads, c.seqlen_q, c.value_dim).to(dtype)
        dlse = make.normal(c.batch, c.heads, c.seqlen_q)
        return cls(case, operands, c.options(make), dout, dlse)

    def run(
        self,
        attend: Callable[..., Any],
        dtype: torch.dtype,
        outputs: Sequence[str] = ("out", "lse"),
        **extra: Any,
    ) -> dict[str, Tensor]:
        """Results by name: out, lse, and the gradient of every differentiable tensor from `outputs`' upstream_grads."""
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in self.operands.items()}
        options = dict(self.options)
        for name in DIFFERENTIABLE_OPTIONS:
            if name in options:
                kept = dtype if dtype == torch.float64 else options[name].dtype
                options[name] = leaves[name] = options[name].detach().to(kept).requires_grad_()
        out, lse = attend(
            leaves["query"], leaves["key"], leaves["value"], **options, **extra, return_lse=True
        )
        upstream_grads = {"out": (out, self.dout.to(out.dtype)), "lse": (lse, self.dlse.to(lse.dtype))}
        used = [upstream_grads[name] for name in outputs]
        grads = torch.autograd.grad(
            [o for o, _ in used], list(leaves.values()), [c for _, c in used], allow_unused=True
        )
        results = {"out": out.detach(), "lse": lse.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads):
            results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
        return results

    def terms(self, outputs: Sequence[str]) -> dict[str, Tensor]:
        """The terms of dquery and dkey, as `assert_each_within_rule` takes them."""
        operands = [t.double() for t in self.operands.values()]
        _, weights = fastattn.reference.attention(*operands, **self.options, return_weights=True)
        upstream = [
            t if name in outputs else torch.zeros_like(t)
            for name, t in (("out", self.dout), ("lse", self.dlse))
        ]
        dquery, dkey = terms_of_score_gradients(*operands, weights, *upstream)
        return {"dquery": dquery, "dkey": dkey}


def check(
    case: Case,
    dtype: torch.dtype,
    outputs: Sequence[str] = ("out", "lse"),
    device: str = "cpu",
    samples: int = 1,
    **extra: Any,
) -> None:
    """Hold `fastattn.attention(**extra)` to the error rule on one case: out, lse and every gradient of every sample.

    Where every query sees one key, out gives its score no gradient but rounding: dquery's and dkey's bound is that of
    their terms.
    """
    for seed in range(samples):
        inputs = Inputs.of(case, dtype, device, seed)
        golden = inputs.run(fastattn.reference.attention, torch.float64, outputs)
        actual = inputs.run(fastattn.attention, dtype, outputs, **extra)
        assert actual["out"].dtype == dtype
        assert actual["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        terms = inputs.terms(outputs) if case.one_key else {}
        plain = partial(inputs.run, fastattn.reference.attention, dtype, outputs)
        assert_each_within_rule(actual, plain, golden, f"{case}, inputs {seed}", dtype, terms)
