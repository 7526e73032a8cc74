"""The Triton kernels of the attention weights against float64, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, Case, Inputs, Maker, Options

from fastattn.backends import triton as backend
from fastattn.reference.attention import masked_scores, weights_from_lse
from fastattn.spec import AttentionSpec, GradsNeeded, WeightsGradsNeeded
from numerics import assert_within_rule


def every_feature(make: Maker) -> Options:
    return {
        "bias": make.normal(2, 1, 37),
        "mask": make.normal(21, 37) < 1.0,
        "alibi_slopes": make.normal(2).abs(),
        "segment_ids": (make.integers(0, 2, 2, 21), make.integers(0, 2, 2, 37)),
        "key_lengths": torch.tensor([37, 30], device=DEVICE),
        "softcap": 3.0,
        "window": (30, 3),
        "dropout_p": 0.2,
        "dropout_seed": 99,
    }


CASES = [
    Case("dense"),
    Case("causal, grouped heads", {"causal": True}, heads=2, seqlen_q=37, seqlen_k=20),
    Case("dropout", {"dropout_p": 0.3, "dropout_seed": 5}),
    Case("everything", every_feature, batch=2, heads=2),
]


def reference_weights(
    inputs: Inputs, leaves: dict[str, torch.Tensor], lse: torch.Tensor, mean: bool
) -> torch.Tensor:
    """The weights of fastattn.reference for given lse."""
    options = inputs.options | {name: leaf for name, leaf in leaves.items() if name in inputs.options}
    dropout = options.pop("dropout_p", 0.0), options.pop("dropout_seed", None)
    scores = masked_scores(leaves["query"], leaves["key"], **options)
    weights = weights_from_lse(scores, lse, *dropout)
    return weights.mean(1) if mean else weights


@pytest.mark.parametrize("mean", [False, True], ids=["each head", "mean"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, mean: bool) -> None:
    inputs = Inputs.of(case)
    call = inputs.call()
    spec = AttentionSpec.of(call)
    _, lse = backend.attention_fwd(spec, call, SMALL_TILES)
    weights = backend.attention_weights_fwd(spec, call, lse, mean, SMALL_TILES)
    dweights = Maker(1).normal(*weights.shape, dtype=case.dtype)
    needs = WeightsGradsNeeded(bias="bias" in inputs.options, alibi_slopes="alibi_slopes" in inputs.options)
    spec = AttentionSpec.of(call, GradsNeeded(bias=needs.bias, alibi_slopes=needs.alibi_slopes))
    grads = backend.attention_weights_bwd(spec, call, lse, dweights, mean, needs, SMALL_TILES)
    actual = dict(zip(needs._fields, grads))

    results = {}
    names = [name for name, need in zip(needs._fields, needs) if need]
    for dtype in (torch.float64, case.dtype):
        leaves = {
            name: (lse if name == "lse" else inputs.differentiable()[name]).to(dtype).requires_grad_()
            for name in names
        }
        expected = reference_weights(inputs, leaves, leaves["lse"], mean)
        expected_grads = torch.autograd.grad(expected, list(leaves.values()), dweights.to(dtype))
        results[dtype] = {"weights": expected, **dict(zip(names, expected_grads))}
    golden, plain = results[torch.float64], results[case.dtype]
    assert_within_rule(weights, plain["weights"], golden["weights"], "weights")
    for name in names:
        shape = golden[name].shape
        assert_within_rule(actual[name].reshape(shape), plain[name], golden[name], f"d{name}")


def test_mean_is_the_mean() -> None:
    call = Inputs.of(Case("mean", {"causal": True}, heads=3, dtype=torch.float32)).call()
    spec = AttentionSpec.of(call)
    _, lse = backend.attention_fwd(spec, call, SMALL_TILES)
    each = backend.attention_weights_fwd(spec, call, lse, False, SMALL_TILES)
    mean = backend.attention_weights_fwd(spec, call, lse, True, SMALL_TILES)
    torch.testing.assert_close(mean, each.mean(1))
    torch.testing.assert_close(each.sum(-1), torch.ones_like(lse))
