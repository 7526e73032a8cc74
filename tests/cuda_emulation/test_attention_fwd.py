"""The Hopper forward kernel, executed by the emulation, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation.attention_forward import Case, check, inputs_of, run

LANDINGS = ("eager", "lazy", "random")

# Tiles: 64: 192x128, capped 128x128; 128: 128x176, with a window or cap 128x128; 256: 128x80.
EDGES = [
    Case(f"D{dim} {name} {m}x{n}", head_dim=dim, seqlen_q=m, seqlen_k=n, options=options)
    for dim, shapes in (
        (64, [(1, 1), (64, 127), (191, 128), (192, 129), (193, 256), (400, 257)]),
        (128, [(1, 1), (65, 176), (127, 175), (128, 177), (129, 352), (260, 130)]),
        (256, [(1, 80), (127, 79), (129, 81), (130, 241)]),
    )
    for m, n in shapes
    for name, options in (("full", {}), ("causal", {"causal": True}))
]
FEATURES = [
    Case("top left", seqlen_q=300, seqlen_k=200, options={"causal": "top_left"}),
    Case("top left, more keys", seqlen_q=100, seqlen_k=300, options={"causal": "top_left"}),
    Case("causal, rows without keys", seqlen_q=500, seqlen_k=150, options={"causal": True}),
    Case("window", seqlen_q=420, seqlen_k=420, options={"window": (70, 30)}),
    Case("window and causal", seqlen_q=420, seqlen_k=460, options={"window": (100, None), "causal": True}),
    Case("window of one key", seqlen_q=200, seqlen_k=200, options={"window": (0, 0)}),
    Case("window to the right", head_dim=128, seqlen_q=150, seqlen_k=290, options={"window": (None, 20)}),
    Case("window, D256", head_dim=256, seqlen_q=130, seqlen_k=300, options={"window": (90, 90)}),
    Case("softcap", options={"softcap": 3.0}),
    Case("softcap and causal", head_dim=128, options={"softcap": 20.0, "causal": True}),
    Case("softcap, D256", head_dim=256, options={"softcap": 5.0, "window": (100, 40)}),
    Case("scale", options={"scale": 0.5}),
    Case("grouped heads", batch=2, heads=6, kv_heads=2, seqlen_q=70, seqlen_k=140, blocks=3),
    Case("one key head", batch=2, heads=3, kv_heads=1, head_dim=128, seqlen_q=140, seqlen_k=70),
    *(Case(f"head dim {dim}", head_dim=dim, seqlen_q=130, seqlen_k=140) for dim in (8, 40, 72, 96, 120)),
    *(Case(f"head dim {dim}", head_dim=dim, seqlen_q=70, seqlen_k=140) for dim in (136, 192, 248)),
    Case("key lengths", batch=4, key_lengths=(300, 0, 129, 1), blocks=3),
    Case("key lengths, causal", batch=3, key_lengths=(170, 20, 255), options={"causal": True}),
    Case("key lengths, D128", head_dim=128, batch=3, key_lengths=(300, 176, 177)),
    Case(
        "key lengths, D256",
        head_dim=256,
        batch=2,
        key_lengths=(163, 80),
        options={"window": (200, 9)},
    ),
]
PACKED = [
    Case("packed", seqlen_q=(70, 200, 1), seqlen_k=(140, 60, 129), heads=2, kv_heads=1),
    Case("packed, causal", seqlen_q=(300, 5, 130), seqlen_k=(300, 150, 20), options={"causal": True}),
    Case("packed, top left", seqlen_q=(100, 260), seqlen_k=(190, 80), options={"causal": "top_left"}),
    Case("packed, window", seqlen_q=(250, 199), seqlen_k=(250, 330), options={"window": (60, 20)}),
    Case("packed, empty sequences", seqlen_q=(0, 40, 33, 0, 9), seqlen_k=(12, 0, 150, 0, 128)),
    Case("packed, no sequence", seqlen_q=(), seqlen_k=(), leftover=70),
    Case("packed, tokens of none", seqlen_q=(50, 100), seqlen_k=(64, 130), leftover=210, heads=2, kv_heads=2),
    Case("packed, D128", head_dim=128, seqlen_q=(128, 129, 3), seqlen_k=(176, 10, 177), blocks=3),
    Case(
        "packed, D256",
        head_dim=256,
        seqlen_q=(60, 150),
        seqlen_k=(81, 160),
        options={"causal": True},
    ),
    Case(
        "packed, softcap, head dim 80",
        head_dim=80,
        seqlen_q=(65, 130),
        seqlen_k=(200, 9),
        options={"softcap": 2.0},
    ),
    Case("packed, many", seqlen_q=(7,) * 30, seqlen_k=(7,) * 30, blocks=5, options={"causal": True}),
]


@pytest.mark.parametrize("case", [*EDGES, *FEATURES, *PACKED], ids=str)
def test_matches_float64(emulated, case: Case) -> None:
    check(emulated, case, seed=len(case.name), landing=LANDINGS[len(case.name) // 3 % 3])


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_any_schedule(emulated, head_dim: int, landing: str) -> None:
    """Each seed draws another order of threads, and the bits are the same."""
    rows = 260 if head_dim < 256 else 140
    case = Case(
        "schedules", head_dim=head_dim, batch=2, seqlen_q=rows, seqlen_k=rows + 100, key_lengths=(rows, rows + 100),
        options={"causal": True}, blocks=1,
    )  # fmt: skip
    results = [check(emulated, case, seed=seed, landing=landing) for seed in range(6)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("seed", range(9))
def test_tiles_without_keys_in_any_schedule(emulated, seed: int) -> None:
    """In these tiles only barriers make the lanes of a warp reconverge."""
    case = Case(
        "no keys", seqlen_q=(5, 0, 128, 129), seqlen_k=(5, 7, 0, 0), leftover=3, heads=2, kv_heads=2, blocks=1
    )
    check(emulated, case, seed=seed)


def test_a_neighbour_of_nan_is_not_noticed(emulated) -> None:
    """Sequences share tiles of keys and values; a NaN does not reach another sequence's rows."""
    case = Case("neighbours", seqlen_q=(70, 60, 200), seqlen_k=(140, 60, 129), heads=2, kv_heads=1)
    inputs = inputs_of(case)
    out, lse = run(emulated, case, inputs)
    for tensor, rows in (
        (inputs.query, slice(70, 130)),
        (inputs.key, slice(140, 200)),
        (inputs.value, slice(140, 200)),
    ):
        tensor[:, :, rows] = math.nan
    poisoned, poisoned_lse = run(emulated, case, inputs)
    assert poisoned[:, :, 70:130].isnan().all()
    for rows in (slice(0, 70), slice(200, 330)):
        assert torch.equal(poisoned[:, :, rows], out[:, :, rows])
        assert torch.equal(poisoned_lse[:, :, rows], lse[:, :, rows])


def test_bits_do_not_depend_on_the_grid_or_the_batch(emulated) -> None:
    case = Case("batch", batch=3, heads=2, kv_heads=2, seqlen_q=200, seqlen_k=200, options={"causal": True})
    inputs = inputs_of(case)
    out, lse = run(emulated, case, inputs)
    for blocks in (1, 5, 40):
        again = run(emulated, Case(**{**case.__dict__, "blocks": blocks}), inputs, seed=blocks)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
    for b in range(3):
        inputs_b = inputs_of(case)
        inputs_b.query, inputs_b.key, inputs_b.value = (
            tensor[b : b + 1] for tensor in (inputs.query, inputs.key, inputs.value)
        )
        alone = run(emulated, case, inputs_b)
        assert torch.equal(alone[0], out[b : b + 1])


@pytest.mark.parametrize("lengths", [260, (260, 3, 0, 190)], ids=["dense", "packed"])
def test_bits_do_not_depend_on_who_takes_a_tile(emulated, lengths: int | tuple[int, ...]) -> None:
    """With the counter, tiles go to blocks as these become free; without it, each block has fixed tiles."""
    case = Case(
        "taken",
        seqlen_q=lengths,
        seqlen_k=lengths,
        heads=2,
        kv_heads=1,
        options={"causal": True},
        fixed_order=True,
    )
    inputs = inputs_of(case)
    out, lse = run(emulated, case, inputs)
    assert out.isfinite().all()
    for seed, (blocks, resident) in enumerate([(1, 1), (2, 2), (4, 3), (40, 3)]):
        counted = Case(**{**case.__dict__, "fixed_order": False, "blocks": blocks, "resident": resident})
        assert counted.counted
        again = run(emulated, counted, inputs, seed=seed)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_large_scores(emulated, options: dict) -> None:
    """Scores of hundreds, of both signs, which overflow without the running maximum."""
    check(emulated, Case("large", seqlen_q=130, seqlen_k=390, options=options), spread=60.0)


def test_rows_without_keys(emulated) -> None:
    case = Case("none", batch=2, seqlen_q=300, seqlen_k=100, key_lengths=(0, 100), options={"causal": True})
    out, lse = run(emulated, case, inputs_of(case))
    for rows in ((0, slice(None)), (1, slice(0, 200))):
        assert not out[rows[0], :, rows[1]].any()
        assert (lse[rows[0], :, rows[1]] == -math.inf).all()
    assert lse[1, :, 200:].isfinite().all()


def test_nan_of_a_visible_key_reaches_the_result(emulated) -> None:
    case = Case("nan", seqlen_q=70, seqlen_k=140)
    inputs = inputs_of(case)
    inputs.value[0, 0, 17, 3] = math.nan
    out, lse = run(emulated, case, inputs)
    assert out[..., 3].isnan().all()
    assert out[..., :3].isfinite().all()
    assert lse.isfinite().all()
