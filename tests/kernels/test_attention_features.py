"""The Triton kernels by the error rule with softcap, masks, biases, ALiBi, segments, sinks and dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import (
    DEVICE,
    SMALL_TILES,
    UNEVEN_TILES,
    Case,
    Inputs,
    Maker,
    Options,
    check,
    run_reference,
    run_triton,
)

import fastattn
from fastattn import reference
from fastattn.backends import triton as backend
from fastattn.spec import AttentionSpec
from numerics import assert_within_rule, plain_in_any_order

BFLOAT = torch.bfloat16
FLOAT32 = {"dtype": torch.float32, "samples": 4}


def some_mask(*shape: int, keep: float = 0.6) -> object:
    """Options with a bool mask of a shape."""

    def options(make: Maker) -> Options:
        return {
            "mask": make.normal(*shape) < torch.distributions.Normal(0, 1).icdf(torch.tensor(keep)).item()
        }

    return options


def some_bias(*shape: int, dtype: torch.dtype = torch.float32, **others: object) -> object:
    """Options with a bias of a shape."""
    return lambda make: {"bias": make.normal(*shape, dtype=dtype), **others}


def packed(*lengths: int) -> torch.Tensor:
    """Segment ids of documents laid end to end, (1, sum of lengths)."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(DEVICE)


CASES = [
    Case("softcap", {"softcap": 1.5}, **FLOAT32),
    Case("softcap, causal", {"softcap": 30.0, "causal": True, "scale": 8.0}),
    Case("mask", some_mask(1, 2, 21, 37), heads=2),
    Case("mask over keys", some_mask(2, 1, 1, 37), batch=2),
    Case("mask over queries", some_mask(21, 1, keep=0.5)),
    Case("mask of nothing", lambda make: {"mask": torch.zeros(21, 37, dtype=torch.bool, device=DEVICE)}),
    Case("mask, causal", lambda make: {**some_mask(21, 37)(make), "causal": True}),
    Case("bias", some_bias(1, 2, 21, 37), heads=2),
    Case("bias, float32", some_bias(21, 37), **FLOAT32),
    Case(
        "bias over batch and heads",
        some_bias(21, 37, dtype=torch.float16, causal=True),
        batch=2,
        heads=2,
    ),
    Case("bias over queries", some_bias(2, 1, 1, 37), batch=2, heads=2),
    Case("bias over keys", some_bias(1, 1, 21, 1)),
    Case("bias per head", some_bias(2, 1, 1), batch=2, heads=2, seqlen_q=20, seqlen_k=20),
    Case("bias in bfloat16, window", some_bias(21, 37, dtype=BFLOAT, window=(9, 9)), dtype=BFLOAT),
    Case("bias, uneven tiles", some_bias(21, 37), tiles=UNEVEN_TILES),
    Case("alibi", lambda make: {"alibi_slopes": make.normal(2).abs()}, heads=2, **FLOAT32),
    Case(
        "alibi per sequence, top left",
        lambda make: {"alibi_slopes": make.normal(2, 2).abs(), "causal": "top_left"},
        batch=2,
        heads=2,
    ),
    Case("segments", lambda make: {"segment_ids": packed(20, 3, 30)}, seqlen_q=53, seqlen_k=53),
    Case(
        "segments, causal",
        lambda make: {"segment_ids": packed(17, 40, 16), "causal": True},
        heads=2,
        seqlen_q=73,
        seqlen_k=73,
    ),
    Case(
        "segments with whole tiles", lambda make: {"segment_ids": packed(64, 36)}, seqlen_q=100, seqlen_k=100
    ),
    Case(
        "segments, unsorted and negative",
        lambda make: {"segment_ids": (make.integers(-1, 3, 2, 21), make.integers(-1, 3, 2, 37))},
        batch=2,
    ),
    Case(
        "segments nobody shares",
        lambda make: {"segment_ids": (make.integers(0, 2, 1, 21), make.integers(5, 7, 1, 37))},
    ),
    Case(
        "segments, uneven tiles",
        lambda make: {"segment_ids": packed(70, 5, 8)},
        seqlen_q=83,
        seqlen_k=83,
        tiles=UNEVEN_TILES,
    ),
    Case("sinks", lambda make: {"sinks": make.normal(2), "causal": True}, heads=2, seqlen_q=53, seqlen_k=37),
    Case(
        "sinks, float32",
        lambda make: {"sinks": make.normal(2), "window": (9, 0)},
        heads=2,
        dtype=torch.float32,
        samples=8,
    ),
    Case("dropout, float32", {"dropout_p": 0.3, "dropout_seed": 1234567890123}, **FLOAT32),
    Case(
        "dropout, causal, grouped heads",
        {"dropout_p": 0.1, "dropout_seed": -5, "causal": True},
        batch=2,
        heads=2,
    ),
    Case("dropout, uneven tiles", {"dropout_p": 0.9, "dropout_seed": 7}, tiles=UNEVEN_TILES),
    Case(
        "everything",
        lambda make: {
            "bias": make.normal(2, 21, 37),
            "mask": make.normal(2, 1, 21, 37) < 1.0,
            "alibi_slopes": make.normal(2).abs(),
            "segment_ids": (make.integers(0, 2, 2, 21), make.integers(0, 2, 2, 37)),
            "key_lengths": torch.tensor([37, 30], device=DEVICE),
            "sinks": make.normal(2),
            "softcap": 3.0,
            "window": (40, 3),
            "dropout_p": 0.2,
            "dropout_seed": 99,
        },
        batch=2,
        heads=2,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("sink", [float("inf"), float("-inf"), 3e38, -3e38, 5.0])
def test_extreme_sinks(sink: float) -> None:
    """A sink of +inf takes all weight, one of -inf none; 53 queries over 37 keys leave some rows nothing else."""
    options = {"sinks": torch.tensor([sink], device=DEVICE), "causal": True}
    case = Case("sink", options, seqlen_q=53, seqlen_k=37)
    inputs = Inputs.of(case)
    actual = run_triton(inputs, SMALL_TILES)
    if sink == float("inf"):  # where the plain formula only finds NaN
        assert (actual["out"] == 0).all()
        assert (actual["lse"] == sink).all()
        torch.testing.assert_close(actual["dsinks"], inputs.dlse.sum((0, 2)))
    else:
        golden = run_reference(inputs, torch.float64)
        plain = plain_in_any_order(partial(run_reference, inputs, torch.float32), golden)
        assert_within_rule(actual["out"], plain["out"], golden["out"], "out", torch.float16)
        assert_within_rule(actual["lse"], plain["lse"], golden["lse"], "lse")
    for name in ("dquery", "dkey", "dvalue", "dsinks"):
        assert actual[name].isfinite().all(), name


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"sinks": torch.tensor([-1e9], device=DEVICE)}], ids=str
)
def test_biases_near_the_end_of_the_range(lowest: float, options: Options) -> None:
    """A bias that stands for a mask: rows of nothing else attend evenly, and so do their gradients, although their lse
    has no digits left for the number of their keys."""
    bias = torch.zeros(21, 37, device=DEVICE)
    bias[:, 20:] = lowest
    bias[5] = lowest
    check(Case("lowest", {"bias": bias, **options}))


@pytest.mark.parametrize("mean", [False, True])
def test_weights_of_biases_near_the_end_of_the_range(mean: bool) -> None:
    bias = torch.full((37,), torch.finfo(torch.float32).min, device=DEVICE)
    inputs = Inputs.of(Case("lowest", {"bias": bias}, heads=2))
    call = inputs.call()
    spec = AttentionSpec.of(call)
    _, lse = backend.attention_fwd(spec, call, SMALL_TILES)
    weights = backend.attention_weights_fwd(spec, call, lse, mean, SMALL_TILES)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 37))


def test_second_derivatives() -> None:
    """Those of the formula in plain torch, from a forward and a backward by the kernels."""
    make = Maker()
    sizes = {"query": (1, 4, 9, 16), "key": (1, 2, 11, 16), "value": (1, 2, 11, 16)}
    tensors = {name: make.normal(*size) for name, size in sizes.items()}

    def run(attend: Callable[..., Any], dtype: torch.dtype, **backend: str) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
        first = torch.autograd.grad(
            attend(*leaves, causal=True, **backend).sin().sum(), leaves, create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    golden = run(reference.attention, torch.float64)
    plain = plain_in_any_order(partial(run, reference.attention, torch.float32), golden)
    for actual, *judged, name in zip(
        run(fastattn.attention, torch.float32, backend="triton"), plain, golden, sizes
    ):
        assert_within_rule(actual, *judged, name)
