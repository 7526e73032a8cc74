"""Packed calls the kernel tests share: inputs, the Triton result with small tiles, and the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from attention_cases import DEVICE, SMALL_TILES, Maker, Options
from torch import Tensor

from fastattn import reference
from fastattn.backends import layout
from fastattn.backends import triton as backend
from fastattn.kernels.tiles import Tiles
from fastattn.ops.varlen import call_arguments
from fastattn.spec import AttentionGrads, AttentionSpec, GradsNeeded, VarlenCall
from numerics import assert_each_within_rule, terms_of_one_key

DIFFERENTIABLE = ("query", "key", "value", "alibi_slopes", "sinks")
RAGGED = ((21, 37), (0, 5), (17, 16), (5, 0), (1, 18))  # queries and keys; one has none, one has no keys


@dataclass(frozen=True)
class Case:
    """One packed call: its sequences, and its options, a function of a tensor maker where they hold tensors."""

    name: str
    options: Options | Callable[[Maker], Options] = field(default_factory=dict)
    lengths: tuple[tuple[int, int], ...] = RAGGED
    rest: tuple[int, int] = (3, 2)  # queries and keys of no sequence
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float16
    samples: int = 1
    tiles: Tiles = SMALL_TILES

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """The tensors of a case and the gradients that come in from above."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    options: Options
    dout: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        """Fresh inputs of a case."""
        make = Maker(seed)
        cu_seqlens_q, cu_seqlens_k = (
            torch.tensor([0, *accumulate(pair[side] for pair in case.lengths)], dtype=torch.int32)
            for side in (0, 1)
        )
        tokens_q, tokens_k = int(cu_seqlens_q[-1]) + case.rest[0], int(cu_seqlens_k[-1]) + case.rest[1]
        return cls(
            query=make.normal(tokens_q, case.heads, case.head_dim, dtype=case.dtype),
            key=make.normal(tokens_k, case.kv_heads, case.head_dim, dtype=case.dtype),
            value=make.normal(tokens_k, case.kv_heads, case.value_dim, dtype=case.dtype),
            cu_seqlens_q=cu_seqlens_q.to(DEVICE),
            cu_seqlens_k=cu_seqlens_k.to(DEVICE),
            dout=make.normal(tokens_q, case.heads, case.value_dim, dtype=case.dtype),
            dlse=make.normal(case.heads, tokens_q),
            options=dict(case.options(make) if callable(case.options) else case.options),
        )

    def call(self) -> VarlenCall:
        """The normalised call a backend gets."""
        tensors = (self.query, self.key, self.value, self.cu_seqlens_q, self.cu_seqlens_k, None, None)
        defaults: Options = {
            "causal": False, "window": None, "alibi_slopes": None, "softcap": None, "sinks": None, "dropout_p": 0.0,
            "dropout_seed": None, "scale": None,
        }  # fmt: skip
        args = call_arguments(*tensors, **{**defaults, **self.options})
        return layout.for_backend(backend, layout.operands(VarlenCall(*args)))

    def differentiable(self) -> dict[str, Tensor]:
        """Every tensor of the call that has a gradient."""
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        return tensors | {name: self.options[name] for name in DIFFERENTIABLE[3:] if name in self.options}

    def needs(self) -> GradsNeeded:
        """All their gradients."""
        return GradsNeeded(**{name: name in self.differentiable() for name in DIFFERENTIABLE})

    def rows(self, b: int) -> slice:
        """The queries of sequence b."""
        return slice(int(self.cu_seqlens_q[b]), int(self.cu_seqlens_q[b + 1]))

    def cols(self, b: int) -> slice:
        """The keys of sequence b."""
        return slice(int(self.cu_seqlens_k[b]), int(self.cu_seqlens_k[b + 1]))

    def alone(self, b: int) -> Inputs:
        """Sequence b as a batch of its own."""
        rows, cols = self.rows(b), self.cols(b)
        options = dict(self.options)
        if "alibi_slopes" in options and options["alibi_slopes"].dim() == 2:
            options["alibi_slopes"] = options["alibi_slopes"][b : b + 1]
        first = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        return replace(
            self, query=self.query[rows], key=self.key[cols], value=self.value[cols], dout=self.dout[rows],
            dlse=self.dlse[:, rows], options=options,
            cu_seqlens_q=torch.cat([first, first + (rows.stop - rows.start)]),
            cu_seqlens_k=torch.cat([first, first + (cols.stop - cols.start)]),
        )  # fmt: skip


def run_triton(inputs: Inputs, tiles: Tiles) -> dict[str, Tensor]:
    """out, lse and every gradient from the Triton backend."""
    call, needs = inputs.call(), inputs.needs()
    spec = AttentionSpec.of(call.as_one_sequence(), needs)
    reason = backend.why_not(spec)
    assert reason is None, reason
    out, lse = backend.varlen_fwd(AttentionSpec.of(call.as_one_sequence()), call, tiles)
    spec, *residuals = layout.upstream(backend, spec, out, lse, inputs.dout, inputs.dlse)
    grads = backend.varlen_bwd(spec, call, *residuals, needs, tiles)
    return {"out": out, "lse": lse, **gradients(inputs, grads)}


def gradients(inputs: Inputs, grads: AttentionGrads) -> dict[str, Tensor]:
    """A backend's gradients in the shapes of the tensors they belong to."""
    return {
        "d" + name: getattr(grads, name).reshape(tensor.shape)
        for name, tensor in inputs.differentiable().items()
    }


def run_reference(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same from the reference, with every float tensor in `dtype`."""
    leaves = {
        name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.differentiable().items()
    }
    options = inputs.options | {name: leaf for name, leaf in leaves.items() if name in inputs.options}
    out, lse = reference.attention_varlen(
        leaves["query"], leaves["key"], leaves["value"], inputs.cu_seqlens_q, inputs.cu_seqlens_k, **options,
        return_lse=True,
    )  # fmt: skip
    results = {"out": out.detach(), "lse": lse.detach()}
    upstream_grads = (inputs.dout.to(dtype), inputs.dlse.to(dtype))
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if out.requires_grad:
        grads = torch.autograd.grad((out, lse), list(leaves.values()), upstream_grads, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads):
        results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def cancelling_terms(inputs: Inputs) -> dict[str, Tensor]:
    """The terms of dquery and dkey in rows that see one key; none under dropout."""
    if inputs.options.get("dropout_p"):
        return {}
    terms = {name: torch.zeros_like(getattr(inputs, name), dtype=torch.float64) for name in ("query", "key")}
    for b in range(len(inputs.cu_seqlens_q) - 1):
        one = inputs.alone(b)
        operands = [t.transpose(0, 1)[None] for t in (one.query, one.key, one.value, one.dout)]
        found = terms_of_one_key(*operands, one.dlse[None], **one.options)
        for name, place, of_one in zip(terms, (inputs.rows(b), inputs.cols(b)), found):
            terms[name][place] = of_one[0].transpose(0, 1)
    return {"d" + name: of_name for name, of_name in terms.items()}


def check(case: Case) -> None:
    """Hold every result of a case to the error rule."""
    for seed in range(case.samples):
        inputs = Inputs.of(case, seed)
        actual = run_triton(inputs, case.tiles)
        golden = run_reference(inputs, torch.float64)
        label = f"{case.name}, inputs {seed}"
        plain = partial(run_reference, inputs, case.dtype)
        assert_each_within_rule(actual, plain, golden, label, case.dtype, cancelling_terms(inputs))
