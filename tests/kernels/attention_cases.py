"""Attention calls the kernel tests share: inputs, the Triton result with small tiles, and the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.backends import layout
from fastattn.backends import triton as backend
from fastattn.kernels.tiles import Tile, Tiles
from fastattn.ops.arguments import call_arguments
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded
from numerics import assert_within_rule, plain_in_any_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_TILE, UNEVEN_TILE = Tile(16, 16, 4, 1), Tile(16, 32, 4, 2)
SMALL_TILES = Tiles(SMALL_TILE, SMALL_TILE, SMALL_TILE, SMALL_TILE)  # lengths from 17 on cross their edges
UNEVEN_TILES = Tiles(Tile(32, 16, 4, 2), UNEVEN_TILE, UNEVEN_TILE, UNEVEN_TILE)
DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
DEFAULTS: dict[str, Any] = {
    "causal": False,
    "window": None,
    "mask": None,
    "bias": None,
    "segment_ids": None,
    "key_lengths": None,
    "alibi_slopes": None,
    "softcap": None,
    "sinks": None,
    "dropout_p": 0.0,
    "dropout_seed": None,
    "scale": None,
}

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call: its shape and its options, which may be a function of a tensor maker for options that hold tensors."""

    name: str
    options: Options | Callable[[Maker], Options] = field(default_factory=dict)
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    seqlen_q: int = 21
    seqlen_k: int = 37
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float16
    samples: int = 1  # inputs, each judged by itself
    tiles: Tiles = SMALL_TILES

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, H, Sq, Sk)."""
        return self.batch, self.heads, self.seqlen_q, self.seqlen_k


class Maker:
    """Random tensors from one seed, made on the CPU so that they are the same everywhere."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator).to(dtype).to(DEVICE)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(DEVICE)


@dataclass
class Inputs:
    """The tensors of a case and the gradients that come in from above."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: Options
    dout: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        """Fresh inputs of a case."""
        make = Maker(seed)
        b, h, hkv, sq, sk = case.batch, case.heads, case.kv_heads, case.seqlen_q, case.seqlen_k
        return cls(
            query=make.normal(b, h, sq, case.head_dim, dtype=case.dtype),
            key=make.normal(b, hkv, sk, case.head_dim, dtype=case.dtype),
            value=make.normal(b, hkv, sk, case.value_dim, dtype=case.dtype),
            dout=make.normal(b, h, sq, case.value_dim, dtype=case.dtype),
            dlse=make.normal(b, h, sq),
            options=dict(case.options(make) if callable(case.options) else case.options),
        )

    def call(self) -> AttentionCall:
        """The normalised call a backend gets."""
        args = call_arguments(self.query, self.key, self.value, **{**DEFAULTS, **self.options})
        return layout.for_backend(backend, layout.operands(AttentionCall(*args)))

    def differentiable(self) -> dict[str, Tensor]:
        """Every tensor of the call that has a gradient."""
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        return tensors | {name: self.options[name] for name in DIFFERENTIABLE[3:] if name in self.options}


def run_triton(inputs: Inputs, tiles: Tiles) -> dict[str, Tensor]:
    """out, lse and every gradient from the Triton backend."""
    call = inputs.call()
    needs = GradsNeeded(**{name: name in inputs.differentiable() for name in DIFFERENTIABLE})
    reason = backend.why_not(AttentionSpec.of(call, needs))
    assert reason is None, reason
    out, lse = backend.attention_fwd(AttentionSpec.of(call), call, tiles)
    spec = AttentionSpec.of(call, needs)
    spec, *residuals = layout.upstream(backend, spec, out, lse, inputs.dout, inputs.dlse)
    grads = backend.attention_bwd(spec, call, *residuals, needs, tiles)
    results = {"out": out, "lse": lse}
    for name in inputs.differentiable():
        grad = getattr(grads, name)
        assert grad.shape == getattr(call, name).shape, name
        results["d" + name] = grad.reshape(inputs.differentiable()[name].shape)
    return results


def run_reference(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from the reference, with every float tensor in `dtype`."""
    leaves = {
        name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.differentiable().items()
    }
    options = inputs.options | {name: leaf for name, leaf in leaves.items() if name in inputs.options}
    out, lse = reference.attention(
        leaves["query"], leaves["key"], leaves["value"], **options, return_lse=True
    )
    upstream_grads = (inputs.dout.to(dtype), inputs.dlse.to(dtype))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), upstream_grads, allow_unused=True)
    results = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads):
        results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def check(case: Case) -> dict[str, Tensor]:
    """Hold every result of a case to the error rule; returns the Triton results of the last sample."""
    for seed in range(case.samples):
        inputs = Inputs.of(case, seed)
        actual = run_triton(inputs, case.tiles)
        golden = run_reference(inputs, torch.float64)
        plain = plain_in_any_order(partial(run_reference, inputs, case.dtype), golden)
        for name in actual:
            label = f"{case.name}, inputs {seed}: {name}"
            assert_within_rule(actual[name], plain[name], golden[name], label, case.dtype)
    return actual
