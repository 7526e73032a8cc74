"""Residuals are the same on every backend: a forward of one with the backward of another keeps the error rule."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, Case, Inputs, run_reference

from fastattn.backends import torch as torch_backend
from fastattn.backends import triton as triton_backend
from fastattn.spec import AttentionSpec, GradsNeeded
from numerics import assert_within_rule

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
    golden, plain = run_reference(inputs, torch.float64), run_reference(inputs, case.dtype)
    for name in inputs.differentiable():
        actual = getattr(grads, name).reshape(golden["d" + name].shape)
        assert_within_rule(actual, plain["d" + name], golden["d" + name], f"d{name}")
