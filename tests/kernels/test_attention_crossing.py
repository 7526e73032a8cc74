"""Residuals are the same on every backend: a forward of one with the backward of another keeps the error rule."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, Case, Inputs, run_reference

import fastattn
from fastattn.backends import torch as torch_backend
from fastattn.backends import triton as triton_backend
from fastattn.spec import AttentionSpec, GradsNeeded
from numerics import assert_within_rule, plain_in_any_order

CASES = [
    Case("causal", {"causal": True}, heads=2),
    Case(
        "lengths, sinks, dropout",
        lambda make: {
            "key_lengths": torch.tensor([0, 30], device=DEVICE),
            "sinks": make.normal(2),
            "dropout_p": 0.2,
            "dropout_seed": 3,
        },
        batch=2,
        heads=2,
        dtype=torch.bfloat16,
    ),
    Case(
        "bias, softcap",
        lambda make: {"bias": make.normal(2, 21, 37), "softcap": 4.0},
        heads=2,
        dtype=torch.float16,
    ),
]


@pytest.mark.parametrize("forward", ["triton", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_of_one_backward_of_the_other(case: Case, forward: str) -> None:
    inputs = Inputs.of(case)
    call = inputs.call()
    needs = GradsNeeded(bias="bias" in inputs.options, sinks="sinks" in inputs.options)
    spec, backward_spec = AttentionSpec.of(call), AttentionSpec.of(call, needs)
    gradients = (inputs.dout, inputs.dlse, needs)
    if forward == "triton":
        out, lse = triton_backend.attention_fwd(spec, call, SMALL_TILES)
        grads = torch_backend.attention_bwd(backward_spec, call, out, lse, *gradients)
    else:
        out, lse = torch_backend.attention_fwd(spec, call)
        grads = triton_backend.attention_bwd(backward_spec, call, out, lse, *gradients, SMALL_TILES)
    golden = run_reference(inputs, torch.float64)
    plain = plain_in_any_order(partial(run_reference, inputs, case.dtype), golden)
    for name in inputs.differentiable():
        actual = getattr(grads, name).reshape(golden["d" + name].shape)
        assert_within_rule(actual, plain["d" + name], golden["d" + name], f"d{name}")


@pytest.mark.parametrize("weights", [True, "mean"])
def test_weights_through_the_public_call(weights: bool | str) -> None:
    """Output, lse and weights of one call, and the gradients that reach its inputs through all three."""
    inputs = Inputs.of(
        Case("weights", {"causal": True, "softcap": 2.0}, heads=2, seqlen_k=21, dtype=torch.float32)
    )
    leaves = [tensor.requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value)]

    def results(name: str) -> list[torch.Tensor]:
        out, lse, w = fastattn.attention(
            *leaves, **inputs.options, return_lse=True, return_weights=weights, backend=name
        )
        total = out.sin().sum() + (w * w).sum() + lse.sum()
        return [out, lse, w, *torch.autograd.grad(total, leaves)]

    for ours, theirs in zip(results("triton"), results("torch")):
        torch.testing.assert_close(ours, theirs)
