"""The Triton kernels by the error rule with softcap, masks, biases, ALiBi, segments, sinks and dropout."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, UNEVEN_TILES, Case, Maker, Options, check

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
    Case("sinks, float32", lambda make: {"sinks": make.normal(2), "window": (9, 0)}, heads=2, **FLOAT32),
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
