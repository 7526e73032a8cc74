"""The Triton kernels by the error rule with softcap, masks, biases, ALiBi, segments, sinks and dropout."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, UNEVEN_TILES, Case, Maker, Options, check

HALF, BFLOAT = torch.float16, torch.bfloat16


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
    Case("softcap", {"softcap": 1.5}, seqlen_q=20),
    Case("softcap, causal, float16", {"softcap": 30.0, "causal": True, "scale": 8.0}, dtype=HALF),
    Case("mask", some_mask(1, 2, 37, 53)),
    Case("mask over keys", some_mask(2, 1, 1, 53), batch=2, dtype=HALF),
    Case("mask over queries", some_mask(37, 1, keep=0.5), dtype=HALF),
    Case("mask of nothing", lambda make: {"mask": torch.zeros(37, 53, dtype=torch.bool, device=DEVICE)}),
    Case("mask, causal", lambda make: {**some_mask(53, 53)(make), "causal": True}, seqlen_q=53),
    Case("bias", some_bias(1, 2, 37, 53)),
    Case("bias over batch and heads", some_bias(37, 53, dtype=HALF, causal=True), batch=2, dtype=HALF),
    Case("bias over queries", some_bias(2, 2, 1, 53), batch=2),
    Case("bias over keys", some_bias(1, 2, 37, 1), dtype=HALF),
    Case("bias per head", some_bias(2, 1, 1), batch=2, seqlen_q=20, seqlen_k=20),
    Case("bias in bfloat16, window", some_bias(2, 37, 53, dtype=BFLOAT, window=(9, 9)), dtype=BFLOAT),
    Case("bias, uneven tiles", some_bias(2, 37, 53), tiles=UNEVEN_TILES),
    Case("alibi", lambda make: {"alibi_slopes": make.normal(2).abs()}),
    Case(
        "alibi per sequence, top left",
        lambda make: {"alibi_slopes": make.normal(2, 2).abs(), "causal": "top_left"},
        batch=2,
        dtype=HALF,
    ),
    Case("segments", lambda make: {"segment_ids": packed(20, 3, 30)}, seqlen_q=53),
    Case(
        "segments, causal",
        lambda make: {"segment_ids": packed(17, 40, 16), "causal": True},
        heads=4,
        seqlen_q=73,
        seqlen_k=73,
    ),
    Case(
        "segments with whole tiles", lambda make: {"segment_ids": packed(64, 36)}, seqlen_q=100, seqlen_k=100
    ),
    Case(
        "segments, unsorted and negative",
        lambda make: {"segment_ids": (make.integers(-1, 3, 2, 37), make.integers(-1, 3, 2, 53))},
        batch=2,
        dtype=HALF,
    ),
    Case(
        "segments nobody shares",
        lambda make: {"segment_ids": (make.integers(0, 2, 1, 37), make.integers(5, 7, 1, 53))},
    ),
    Case(
        "segments, uneven tiles",
        lambda make: {"segment_ids": packed(70, 5, 8)},
        1,
        2,
        1,
        83,
        83,
        tiles=UNEVEN_TILES,
    ),
    Case("sinks", lambda make: {"sinks": make.normal(2), "causal": True}, batch=2, seqlen_q=53, seqlen_k=37),
    Case("sinks, float16", lambda make: {"sinks": make.normal(2), "window": (9, 0)}, dtype=HALF),
    Case("dropout", {"dropout_p": 0.3, "dropout_seed": 1234567890123}),
    Case(
        "dropout, causal, grouped heads",
        {"dropout_p": 0.1, "dropout_seed": -5, "causal": True},
        batch=2,
        heads=4,
        dtype=HALF,
    ),
    Case("dropout, uneven tiles", {"dropout_p": 0.9, "dropout_seed": 7}, tiles=UNEVEN_TILES),
    Case(
        "everything",
        lambda make: {
            "bias": make.normal(2, 37, 53),
            "mask": make.normal(2, 1, 37, 53) < 1.0,
            "alibi_slopes": make.normal(2).abs(),
            "segment_ids": (make.integers(0, 2, 2, 37), make.integers(0, 2, 2, 53)),
            "key_lengths": torch.tensor([53, 30], device=DEVICE),
            "sinks": make.normal(2),
            "softcap": 3.0,
            "window": (40, 3),
            "dropout_p": 0.2,
            "dropout_seed": 99,
        },
        batch=2,
        kv_heads=1,
        dtype=HALF,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case) -> None:
    check(case)
