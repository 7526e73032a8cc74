"""The Triton softmax through the interpreter against float64, its thresholds, and its binaries."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import DEVICE
from compiler_process import answers_of
from softmax_cases import (
    CASES,
    DTYPES,
    SCALES,
    assert_hidden_as_in_the_reference,
    call_for_kernels,
    inputs,
    non_finite,
    reference,
)
from torch import Tensor

import fastattn
from fastattn.backends.triton import softmax as backend
from fastattn.kernels import row_tiles
from fastattn.kernels.row_tiles import RowTile, loss_tile_for, row_tile_for
from fastattn.kernels.softmax_launches import Rows
from fastattn.spec import SoftmaxCall, SoftmaxSpec
from numerics import assert_within_rule, plain_in_any_order

TILES = {"the spec's": None, "in chunks": RowTile(2, 8, 1, whole=False)}


def forward(x: Tensor, dim: int, tile: RowTile | None = None, **options: Any) -> tuple[Tensor, SoftmaxCall]:
    call = call_for_kernels(x, dim, **options)
    spec = SoftmaxSpec.of(x, call.dim, mask=call.mask is not None, causal=call.causal, log=call.log)
    return backend.softmax_fwd(spec, call, tile), call


def forward_and_backward(
    x: Tensor, dout: Tensor, dim: int, tile: RowTile | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    out, call = forward(x, dim, tile, **options)
    spec = SoftmaxSpec.of(out, call.dim, log=call.log, backward=True)
    return out, backend.softmax_bwd(spec, dout, out, call.dim, call.scale, x.dtype, tile)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(name: str, dtype: torch.dtype, tile: RowTile | None) -> None:
    x, dout, dim, options = inputs(name, dtype, DEVICE)
    actual = forward_and_backward(x, dout, dim, tile, **options)
    golden = reference(x.double(), dout.double(), dim, **options)
    plain = plain_in_any_order(partial(reference, x, dout, dim, **options), golden)
    for result, *three in zip(("out", "dx"), actual, plain, golden):
        assert_within_rule(*three, result)


def assert_as_the_formula(
    actual: tuple[Tensor, Tensor], x: Tensor, dout: Tensor, dim: int, **options: Any
) -> None:
    golden = reference(x.double(), dout.double(), dim, **options)
    formula = plain_in_any_order(partial(reference, x, dout, dim, **options), golden)
    for name, *three in zip(("out", "dx"), actual, formula, golden):
        assert_within_rule(*three, name)


WHOLE_FWD, WHOLE_BWD = row_tiles.WHOLE_ROW_COLUMNS[False], row_tiles.WHOLE_ROW_COLUMNS[True]


@pytest.mark.parametrize(
    "columns", [1, 2, 1024, 2048, 2049, WHOLE_BWD, WHOLE_BWD + 1, WHOLE_FWD, WHOLE_FWD + 1, 300_000]
)
def test_both_sides_of_every_threshold(columns: int) -> None:
    x, dout = torch.randn(3, columns, device=DEVICE), torch.randn(3, columns, device=DEVICE)
    assert_as_the_formula(forward_and_backward(x, dout, -1), x, dout, -1)


def test_thresholds_are_where_the_data_says() -> None:
    spec = SoftmaxSpec.of(torch.empty(1, WHOLE_FWD))
    for whole, backward in ((WHOLE_FWD, False), (WHOLE_BWD, True)):
        at, beyond = (spec.replace(columns=c, backward=backward) for c in (whole, 2 * whole))
        assert row_tile_for(at) == RowTile(1, whole, 32 if whole > 16384 else 16, whole=True)
        assert row_tile_for(beyond).columns == row_tiles.LONG_CHUNK[backward]
        assert not row_tile_for(beyond).whole
    assert row_tile_for(spec.replace(columns=row_tiles.TILE_ELEMENTS)).rows == 1
    assert row_tile_for(spec.replace(columns=row_tiles.TILE_ELEMENTS // 2)).rows == 2
    strided = spec.replace(unit_columns=False)
    assert row_tile_for(strided.replace(columns=row_tiles.STRIDED_WHOLE_COLUMNS)).whole
    assert not row_tile_for(strided.replace(columns=2 * row_tiles.STRIDED_WHOLE_COLUMNS)).whole
    assert loss_tile_for(spec.replace(columns=256)).columns == 256
    assert loss_tile_for(spec.replace(columns=2**17)).columns == row_tiles.LOSS_CHUNK


@pytest.mark.parametrize("columns", [row_tiles.STRIDED_WHOLE_COLUMNS, row_tiles.STRIDED_WHOLE_COLUMNS + 1])
def test_columns_apart_in_memory(columns: int) -> None:
    x, dout = torch.randn(2, columns, 5, device=DEVICE), torch.randn(2, columns, 5, device=DEVICE)
    assert_as_the_formula(forward_and_backward(x, dout, 1), x, dout, 1)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("log", [False, True])
def test_rows_without_entries_and_what_a_mask_hides(log: bool, tile: RowTile | None) -> None:
    x, dout = torch.randn(4, 19, device=DEVICE), torch.randn(4, 19, device=DEVICE)
    mask = torch.rand(4, 19, device=DEVICE) < 0.5
    mask[2] = False
    poisoned = [t.masked_fill(~mask, float("nan")) for t in (x, dout)]
    clean = forward_and_backward(x, dout, -1, tile, mask=mask, log=log)
    for a, b in zip(clean, forward_and_backward(*poisoned, -1, tile, mask=mask, log=log)):
        assert torch.equal(a, b)
    out, dx = clean
    assert bool((out[2] == (-torch.inf if log else 0)).all())
    assert not dx[2].any()


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_entries_that_are_not_finite(scale: float, log: bool, tile: RowTile | None) -> None:
    x, dout, options = non_finite(19, DEVICE)
    options |= {"scale": scale, "log": log}
    actual = forward_and_backward(x, dout, -1, tile, **options)
    assert_hidden_as_in_the_reference(x, dout, actual, **options)


def test_layouts() -> None:
    """Permuted, sliced, expanded and five-dimensional inputs, and a gradient in another order than its tensor."""
    base = torch.randn(4, 3, 6, 5, device=DEVICE)
    wide_mask = torch.rand(2, 1, 3, 1, 7, device=DEVICE) < 0.7
    cases: list[tuple[Tensor, int, dict[str, Any]]] = [
        (base.permute(2, 0, 3, 1), 1, {}),
        (base.permute(2, 0, 3, 1), 3, {"causal": True}),
        (base[::2, :, 1:5, ::2], -1, {}),
        (torch.randn(4, 1, 5, device=DEVICE).expand(4, 3, 5), 1, {}),
        (torch.randn(2, 3, 3, 2, 7, device=DEVICE), -1, {"mask": wide_mask}),
        (torch.randn(2, 3, 3, 2, 7, device=DEVICE).permute(3, 0, 4, 1, 2), 2, {}),
    ]
    for x, dim, options in cases:
        dout = torch.randn(x.shape[::-1], device=DEVICE).permute(*range(x.dim() - 1, -1, -1))
        actual = forward_and_backward(x, dout, dim, **options)
        assert_as_the_formula(actual, x, dout, dim, **options)
        assert actual[0].stride() == torch.empty_like(x).stride()


def test_a_diagonal_across_rows_is_part_of_the_mask() -> None:
    """In the op and in its plan, which runs from the third call on."""
    x, mask = torch.randn(4, 5, 6, device=DEVICE), torch.rand(5, 6, device=DEVICE) < 0.8
    expected, _ = forward(x, 0, causal=True, mask=mask)
    for _ in range(4):
        assert torch.equal(fastattn.softmax(x, 0, causal=True, mask=mask, backend="triton"), expected)
    assert_within_rule(
        expected, fastattn.reference.softmax(x, 0, causal=True, mask=mask),
        fastattn.reference.softmax(x.double(), 0, causal=True, mask=mask), "out",
    )  # fmt: skip


def test_rows_collapse_to_what_the_kernel_takes() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert Rows.of([x, x], 3) == Rows((1, 1, 24, 5), ((0, 0, 5, 1),) * 2)
    assert Rows.of([x, x], 3, inner=2).sizes == (1, 6, 4, 5)
    assert Rows.of([x, x], 1).sizes == (1, 2, 20, 3)
    mask = torch.empty(2, 1, 4, 1).expand(x.shape)
    assert Rows.of([mask, x, x], 3).sizes == (2, 3, 4, 5)
    assert (
        Rows.of([torch.empty(2, 1, 4, 1, 2).expand(2, 3, 4, 5, 2)] + [torch.empty(2, 3, 4, 5, 2)] * 2, 4)
        is None
    )


def test_a_wider_result_and_empty_ones() -> None:
    x = torch.randn(3, 9, device=DEVICE).half()
    out, call = forward(x, -1)
    wide = backend.softmax_fwd(SoftmaxSpec.of(x), replace(call, dtype=torch.float32))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.half(), out)
    for shape in ((0, 4), (4, 0)):
        empty = torch.empty(shape, device=DEVICE)
        assert forward_and_backward(empty, empty, -1)[1].shape == shape


def test_offsets_beyond_32_bits() -> None:
    """Rows 2**30 elements apart; only the pages in use are ever touched."""
    near = torch.randn(3, 20, device=DEVICE).half()
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided(near.shape, (2**30, 1)).copy_(near)
    apart = storage.as_strided((3, 20), (1, 2**26), 32).copy_(near)
    expected, _ = forward(near, -1)
    assert torch.equal(forward(far, -1)[0], expected)
    torch.testing.assert_close(forward(apart, -1)[0], expected)


@pytest.mark.exhaustive  # the compile table has these rows, and is that of the kernels
def test_tiles_compile_without_spills() -> None:
    report = answers_of("row_compile.py", "--compile")
    assert len(report["compiled"]) == 10
    for name, made in report["compiled"].items():
        assert made["error"] == "", name
        assert made["registers"] > 0, name
        assert made["local_ops"] == 0, name
        assert made["shared"] <= 49152, name


def test_lengths_share_one_variant() -> None:
    """Lengths of one power of two, every long row, and every vocabulary: nothing is compiled twice."""
    report = answers_of("row_compile.py")
    assert len(report["signatures"]) == 6
    for name, found in report["signatures"].items():
        assert len(found) == 3, name
        assert len(set(found)) == 1, name
