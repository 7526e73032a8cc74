"""`attention` as a torch op: opcheck, compiled code, export."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from attention_inputs import qkv
from torch import Tensor
from torch.library import opcheck

import fastattn
from fastattn.ops.arguments import call_arguments

OPCHECK_OPTIONS = {
    "plain": {},
    "masked": {"causal": True, "window": (3, None), "mask": torch.ones(9, 11, dtype=torch.bool)},
    "ragged": {"key_lengths": torch.tensor([3, 11]),
               "segment_ids": (torch.zeros(2, 9).int(), torch.zeros(2, 11).int())},
    "differentiable": {
        "bias": torch.randn(4, 9, 11, requires_grad=True), "sinks": torch.randn(4, requires_grad=True),
        "alibi_slopes": torch.rand(4).requires_grad_(), "dropout_p": 0.2, "dropout_seed": 3, "softcap": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("view", ["permuted", "expanded", "transposed"])
def test_opcheck_of_a_bias_in_any_layout(view: str) -> None:
    """The gradient's strides are what tracing was told, so that compiled code may rely on them."""
    bias = {
        "permuted": torch.randn(9, 11, 4).permute(2, 0, 1)[None],
        "expanded": torch.randn(1, 1, 9, 11).expand(2, 4, 9, 11),
        "transposed": torch.randn(2, 4, 11, 9).mT,
    }[view].requires_grad_()
    slopes = torch.rand(4, 2).T.requires_grad_()
    args = call_arguments(*qkv(grad=True), bias=bias, alibi_slopes=slopes)
    opcheck(torch.ops.fastattn.attention_fwd.default, (*args, "auto"))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    out, lse = torch.ops.fastattn.attention_fwd(*detached, "auto")
    needs = [True] * 5 + [False]
    opcheck(torch.ops.fastattn.attention_bwd.default, (out, None, out, lse, *detached, needs, "auto"))


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "bhsd") for name in OPCHECK_OPTIONS), ("differentiable", "bshd")]
)
def test_opcheck(name: str, layout: str) -> None:
    options = OPCHECK_OPTIONS[name]
    q, k, v = qkv(hkv=2, dv=6, grad=True)
    if layout == "bshd":
        q = torch.randn(2, 9, 4, 8).transpose(1, 2).requires_grad_()
    args = call_arguments(q, k, v, **options)
    ops = torch.ops.fastattn
    opcheck(ops.attention_fwd.default, (*args, "auto"))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    out, lse = ops.attention_fwd(*detached, "auto")
    needs = [True] * 3 + ["bias" in options, "alibi_slopes" in options, "sinks" in options]
    opcheck(ops.attention_bwd.default, (out, lse, out, lse, *detached, needs, "auto"))
    opcheck(ops.attention_bwd.default, (out, None, out, lse, *detached, [False] * 6, "auto"))
    for mean in (False, True):
        opcheck(ops.attention_weights.default, (lse, *args, mean, "auto"))
        weights = ops.attention_weights(lse, *detached, mean, "auto")
        opcheck(ops.attention_weights_bwd.default, (weights, lse, *detached, mean, needs[:5], "auto"))


def test_compile_without_breaks_or_recompiles_across_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return fastattn.attention(
            q,
            k,
            v,
            causal=True,
            window=(50, 0),
            mask=mask,
            key_lengths=lengths,
            return_lse=True,
            return_weights="mean",
        )

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for step, length in enumerate((5, 17, 1000, 64, 33)):
        leaves = [torch.randn(2, 4, length, 8, requires_grad=True) for _ in range(3)]
        extra = torch.rand(length, length) < 0.9, torch.tensor([length, 1])
        actual, expected = compiled(*leaves, *extra), attend(*leaves, *extra)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e)
        actual[0].sum().backward()
        if step == 1:
            counter.frame_count = (
                0  # static shapes first, dynamic ones with the second length: torch's own way
            )
    assert counter.frame_count == 0


def test_compiled_dropout_draws_anew() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda: fastattn.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(), compiled())


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_compiled_code_takes_any_number(option: str) -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda number: fastattn.attention(q, k, v, **{option: number}), fullgraph=True, backend="aot_eager"
    )
    for number in (0.5, 0.7, 2.0, 3):
        torch.testing.assert_close(compiled(number), fastattn.attention(q, k, v, **{option: number}))


def test_export() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention(q, k, v, causal=True)

    length = torch.export.Dim("length")
    example = tuple(torch.randn(2, 4, 9, 8) for _ in range(3))
    program = torch.export.export(Attend(), example, dynamic_shapes=({2: length},) * 3)
    inputs = tuple(torch.randn(2, 4, 33, 8) for _ in range(3))
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))
