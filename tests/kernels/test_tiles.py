"""The tile table: complete, well formed, and chosen by what a spec says alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastattn.kernels import tiles
from fastattn.kernels.tiles import (
    FAMILIES,
    HEAD_DIMS,
    SCORE_MODS,
    TABLE,
    WITH_OLDER_TRITON,
    WITHOUT_TMA,
    WITHOUT_TMA_BY_SCORE,
    Key,
    family_of,
    is_older,
    key_of,
    table_tiles,
    tiles_without_tma,
)
from fastattn.kernels.tuned import tiles_for
from fastattn.spec import AttentionCall, AttentionSpec


def spec_of(head_dim: int = 64, dtype: torch.dtype = torch.float16, **changes: object) -> AttentionSpec:
    query = torch.empty(1, 1, 16, head_dim, dtype=dtype)
    return AttentionSpec.of(AttentionCall(query, query, query)).replace(device="cuda", arch=90, **changes)


def test_every_key_has_a_row() -> None:
    keys = {Key(*key) for key in product(FAMILIES, (16, 32), HEAD_DIMS, (False, True))}
    assert set(TABLE) == keys


@pytest.mark.parametrize("key", TABLE, ids=str)
def test_rows_are_well_formed(key: Key) -> None:
    """Blocks are powers of two that matrix units take; a call of the dropout stream serves eight keys."""
    rows = [TABLE[key], WITHOUT_TMA.get(key, TABLE[key])]
    for tile in (tile for row in rows for tile in (row.forward, row.dkdv, row.dq, row.dbias)):
        for block in (tile.block_m, tile.block_n):
            assert block >= 16
            assert block & (block - 1) == 0
        assert tile.num_warps in (4, 8)
        assert 1 <= tile.num_stages <= 4


@pytest.mark.parametrize("key", TABLE, ids=str)
def test_rows_that_load_by_tma_have_others_in_their_place(key: Key) -> None:
    """Only 16-bit rows of Hopper load by TMA, never the gradient of a bias, and what stands in for them doesn't."""
    tiles = (TABLE[key].forward, TABLE[key].dkdv, TABLE[key].dq)
    assert any(tile.tma for tile in tiles) == (key in WITHOUT_TMA) == (key.family == 90 and key.bits == 16)
    others = WITHOUT_TMA.get(key, TABLE[key])
    assert not any(tile.tma for tile in (others.forward, others.dkdv, others.dq, TABLE[key].dbias))
    assert others.dbias == TABLE[key].dbias


def test_a_spec_that_is_not_aligned_takes_the_row_without_tma() -> None:
    assert tiles_for(spec_of()).forward.tma
    assert tiles_for(spec_of(aligned=False)) == tiles_without_tma(spec_of())
    assert not tiles_without_tma(spec_of()).forward.tma


@pytest.mark.parametrize("key", [key for key in TABLE if key.has_score_mods], ids=str)
@pytest.mark.parametrize("feature", ["mask", "bias"])
def test_what_reads_something_for_each_score_may_have_the_tile_without_tma(key: Key, feature: str) -> None:
    """Only where that tile exists, and only with a mask or a bias: the others keep the row's."""
    dtype = torch.float32 if key.bits == 32 else torch.float16
    plain = spec_of(key.head_dim, dtype).replace(arch=key.family, softcap=True)
    row, other = tiles_for(plain), tiles_for(plain.replace(**{feature: True}))
    assert row == TABLE[key]
    for kernel in ("forward", "dkdv", "dq", "dbias"):
        without = kernel in WITHOUT_TMA_BY_SCORE.get(key, ())
        assert getattr(other, kernel) == getattr(tiles_without_tma(plain) if without else row, kernel)
        assert not without or getattr(row, kernel).tma


@pytest.mark.parametrize(
    ("version", "older"),
    [("3.6.0", True), ("3.5.1", True), ("2.3.1", True), ("3.7.0", False), ("3.10.0", False), ("4.0.0", False),
     ("3.6.0+git1a2b", True), (None, False), ("0+unknown", False), ("main", False)],
)  # fmt: skip
def test_an_older_triton_has_tiles_of_its_own(
    version: str | None, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_triton", lambda: version)
    assert is_older(version) == older
    for key, row in TABLE.items():
        spec = spec_of(key.head_dim, torch.float32 if key.bits == 32 else torch.float16).replace(
            arch=key.family, softcap=key.has_score_mods
        )
        expected = WITH_OLDER_TRITON.get(key, {}) if older else {}
        assert table_tiles(spec) == replace(row, **expected)


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        (None, 80),
        (80, 80),
        (86, 86),
        (87, 80),
        (89, 86),
        (90, 90),
        (100, 100),
        (103, 100),
        (120, 120),
        (121, 120),
    ],
)
def test_families(arch: int | None, family: int) -> None:
    assert family_of(arch) == family


def test_an_architecture_to_come_takes_the_nearest_one_below() -> None:
    assert family_of(95) == 90
    assert family_of(130) == 120


@pytest.mark.parametrize(
    ("head_dim", "row"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256), (256, 256)]
)
def test_head_dims_round_up(head_dim: int, row: int) -> None:
    assert key_of(spec_of(head_dim)).head_dim == row
    assert key_of(spec_of(16, value_dim=head_dim)).head_dim == max(row, 64)


@pytest.mark.parametrize("feature", SCORE_MODS)
def test_what_changes_scores_takes_rich_rows(feature: str) -> None:
    assert key_of(spec_of(**{feature: True})).has_score_mods
    assert not key_of(
        spec_of(causal="bottom_right", window_left=True, key_lengths=True, sinks=True)
    ).has_score_mods


def test_float32_has_rows_of_its_own() -> None:
    assert key_of(spec_of(dtype=torch.float32)).bits == 32
    assert key_of(spec_of(dtype=torch.bfloat16)).bits == 16


def test_forward_and_backward_share_a_row() -> None:
    assert tiles_for(spec_of(backward=True)) == tiles_for(spec_of())
