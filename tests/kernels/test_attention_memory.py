"""Memory accesses of the Triton kernels: excluded blocks are never read, and offsets may exceed 32 bits."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, Case, Inputs, run_triton
from test_attention_features import packed

NAN = float("nan")
SEGMENTS = packed(32, 48)

EXCLUDED = {
    "causal": (
        {"causal": "top_left"},
        slice(48, 80),
    ),  # 40 queries see keys below 40, the last block begins at 32
    "window left": (
        {"window": (8, None)},
        slice(0, 16),
    ),  # the first query stands at 40 and sees keys from 32
    "window right": ({"window": (None, 0), "causal": "top_left"}, slice(48, 80)),
    "segments": ({"segment_ids": (SEGMENTS[:, :32], SEGMENTS)}, slice(32, 80)),
    "lengths": ({"key_lengths": torch.tensor([33], device=DEVICE)}, slice(48, 80)),
}


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
@pytest.mark.parametrize("name", EXCLUDED)
def test_excluded_blocks_are_never_loaded(name: str) -> None:
    """NaN in a block that no query sees would reach the results through 0 * NaN."""
    options, keys = EXCLUDED[name]
    case = Case(name, options, seqlen_q=32 if name == "segments" else 40, seqlen_k=80)
    inputs = Inputs.of(case)
    expected = run_triton(inputs, SMALL_TILES)
    inputs.key[:, :, keys] = NAN
    inputs.value[:, :, keys] = NAN
    actual = run_triton(inputs, SMALL_TILES)
    for result, tensor in expected.items():
        assert torch.equal(tensor, actual[result]), result


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
@pytest.mark.parametrize("name", ["causal", "window left", "segments"])
def test_excluded_queries_are_never_loaded(name: str) -> None:
    """Nor does a key block whose queries all lie elsewhere read them."""
    options = {
        "causal": {"causal": "top_left"},  # keys from 32 on are not seen by queries below 32
        "window left": {"window": (8, None), "causal": "top_left"},
        "segments": {"segment_ids": (SEGMENTS, SEGMENTS)},
    }[name]
    inputs = Inputs.of(Case(name, options, seqlen_q=80, seqlen_k=80))
    expected = run_triton(inputs, SMALL_TILES)
    rows = slice(64, 80) if name == "window left" else slice(0, 32)
    keys = slice(0, 48) if name == "window left" else slice(32, 80)
    inputs.query[:, :, rows] = NAN
    inputs.dout[:, :, rows] = NAN
    actual = run_triton(inputs, SMALL_TILES)
    for result in ("dkey", "dvalue"):
        assert torch.equal(expected[result][:, :, keys], actual[result][:, :, keys]), result


@pytest.mark.parametrize("far", ["rows", "heads"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """Strides that put the last row or head past 2**31 elements; only the pages in use are ever touched."""
    case = Case("far", {"causal": True}, heads=2, kv_heads=2, seqlen_q=20, seqlen_k=20, dtype=torch.float16)
    inputs = Inputs.of(case)
    expected = run_triton(inputs, SMALL_TILES)
    span = 2**31 + 2**20
    strides = (span, 64, span // 20, 1) if far == "rows" else (span, 2**31, 64, 1)
    storage = torch.empty(span, dtype=torch.float16, device=DEVICE)
    for index, name in enumerate(("query", "key", "value", "dout")):
        near = getattr(inputs, name)
        view = storage.as_strided(near.shape, strides, storage_offset=16 * index)
        view.copy_(near)
        setattr(inputs, name, view)
    actual = run_triton(inputs, SMALL_TILES)
    for result, tensor in expected.items():
        assert torch.equal(tensor, actual[result]), result
