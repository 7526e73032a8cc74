"""Rotary tables against transformers and complex numbers, ALiBi slopes, positions from masks and segments."""

import math

import pytest
import torch

from fastattn.nn.positions import (
    Rotary,
    alibi_slopes,
    apply_rotary,
    lengths_of_segments,
    positions_from_mask,
    positions_in_segments,
    positions_of_tokens,
    sinusoids,
)
from fastattn.nn.rotary_scaling import RotaryScaling


def test_rotary_is_llamas():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    )
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    positions = torch.arange(9)[None].expand(2, -1) + torch.tensor([[0], [4]])
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    rotary = Rotary(16, base=5000.0)
    table = rotary.table(positions)
    torch.testing.assert_close((rotary.apply(q, table), rotary.apply(k, table)), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 6, 2])
def test_rotary_is_a_rotation_of_pairs(interleaved, rotary_dim):
    rotary = Rotary(10, rotary_dim=rotary_dim, interleaved=interleaved)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 5, 100, 7, 3])
    out = rotary.apply(x, rotary.table(positions, torch.float64))
    for pair in range(rotary.dim // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary.dim // 2)
        turn = torch.polar(torch.ones(7).double(), positions.double() * 10000.0 ** (-2 * pair / rotary.dim))
        expected = torch.complex(x[..., first], x[..., second]) * turn
        torch.testing.assert_close(torch.complex(out[..., first], out[..., second]), expected)
    assert torch.equal(out[..., rotary.dim :], x[..., rotary.dim :])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_dynamic_scaling_of_a_single_pair_is_refused():
    """Its base is raised to dim / (dim - 2)."""
    scaling = RotaryScaling("dynamic", 2.0, 8)
    for options in ({"head_dim": 2}, {"head_dim": 10, "rotary_dim": 2}):
        with pytest.raises(ValueError, match="scaling: dynamic scaling needs a rotary_dim above 2, got 2"):
            Rotary(**options, scaling=scaling)
    cos, sin = Rotary(10, rotary_dim=4, scaling=scaling).table(torch.arange(20))
    assert bool((cos.isfinite() & sin.isfinite()).all())


@pytest.mark.parametrize(
    ("ids", "pad", "first", "past", "expected"),
    [
        ([[5, 1, 7, 1]], 1, 2, 0, [[2, 1, 3, 1]]),
        ([[5, 1, 7, 1]], 1, 2, 3, [[5, 1, 6, 1]]),
        ([[5, 1, 7]], None, 2, 1, [[3, 4, 5]]),
        ([[1, 1], [4, 5]], 1, 2, 0, [[1, 1], [2, 3]]),
    ],
)
def test_positions_of_tokens_skip_padding(ids, pad, first, past, expected):
    assert positions_of_tokens(torch.tensor(ids), pad, first, past).tolist() == expected


def test_rotary_scores_depend_on_differences_of_positions():
    rotary = Rotary(16)
    q, k = torch.randn(2, 1, 1, 6, 16, dtype=torch.float64)
    scores = []
    for start in (0, 50):
        table = rotary.table(torch.arange(start, start + 6), torch.float64)
        scores.append(rotary.apply(q, table) @ rotary.apply(k, table).mT)
    torch.testing.assert_close(scores[0], scores[1])


def test_rotary_by_row_dtype_and_gradient():
    rotary = Rotary(8)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    table = rotary.table(positions, torch.float64)
    out = rotary.apply(x, table)
    for row in range(2):
        alone = rotary.apply(x[row : row + 1], rotary.table(positions[row], torch.float64))
        torch.testing.assert_close(out[row : row + 1], alone)
    assert torch.autograd.gradcheck(lambda t: apply_rotary(t, table), (x,))
    half = x.detach().bfloat16()
    assert rotary.apply(half, rotary.table(positions)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"rotary_dim": 10}, "rotary_dim"),
        ({"base": 0.0}, "base"),
        ({"rotary_dim": 0}, "rotary_dim"),
    ],
)
def test_bad_rotary(options, name):
    with pytest.raises(ValueError, match=name):
        Rotary(8, **options)


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12, 16, 25])
def test_alibi_slopes_are_blooms(num_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    expected = bloom.build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), expected)


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)


def test_positions_from_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 1, 2]])
    assert torch.equal(positions_from_mask(mask), expected)
    assert torch.equal(positions_from_mask(mask.bool()), expected)
    assert torch.equal(positions_from_mask(3.5 * mask), expected)


def test_positions_in_segments():
    ids = torch.tensor([[5, 5, 5, 2, 2, -1, -1], [0, 1, 1, 0, 0, 0, 3]])
    expected = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 0, 1, 2, 0]])
    assert torch.equal(positions_in_segments(ids), expected)
    assert positions_in_segments(ids[:, :0]).shape == (2, 0)


SCALINGS = {
    "default": (None, {}),
    "linear": (RotaryScaling("linear", 2.5, 16), {"factor": 2.5}),
    "dynamic": (RotaryScaling("dynamic", 2.0, 16), {"factor": 2.0}),
    "yarn": (RotaryScaling("yarn", 4.0, 16), {"factor": 4.0, "original_max_position_embeddings": 16}),
    "yarn, its own numbers": (
        RotaryScaling(
            "yarn", 3.0, 64, beta_fast=9.0, beta_slow=0.3, mscale=0.7, mscale_all_dim=0.9, truncate=False
        ),
        {
            "factor": 3.0, "original_max_position_embeddings": 64, "beta_fast": 9.0, "beta_slow": 0.3,
            "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
        },
    ),
    "yarn, a magnitude given": (
        RotaryScaling("yarn", 4.0, 16, attention_factor=1.3),
        {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    ),
    "llama3": (
        RotaryScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
        {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [9, 40])
def test_tables_have_the_bits_of_transformers(name, length):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling, numbers = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=16,
        rope_parameters={"rope_type": name.split(",")[0], "rope_theta": 500.0, **numbers},
    )  # fmt: skip
    positions = torch.arange(length)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    ours = Rotary(32, base=500.0, scaling=scaling).table(positions)
    assert torch.equal(ours[0], cos[0, :, :16])
    assert torch.equal(ours[1], sin[0, :, :16])


def test_dynamic_scaling_goes_by_each_sequences_length():
    rotary = Rotary(8, scaling=RotaryScaling("dynamic", 2.0, 4))
    long, short = rotary.table(torch.arange(9)), rotary.table(torch.arange(3))
    batch = rotary.table(torch.stack((torch.arange(9), torch.arange(9).clamp(max=2))))
    for part in (0, 1):
        assert torch.equal(batch[part][0], long[part])
        assert torch.equal(batch[part][1, :3], short[part])
        assert torch.equal(short[part], Rotary(8).table(torch.arange(3))[part])
    steps = rotary.table(torch.arange(9), lengths=torch.arange(9) + 1)
    assert torch.equal(steps[0][8], long[0][8])
    assert torch.equal(steps[0][:4], Rotary(8).table(torch.arange(4))[0])
    assert rotary.table(torch.arange(0))[0].shape == (0, 4)


def test_sinusoids_are_the_papers_formula():
    table = sinusoids(torch.tensor([[0, 1, 7]]), 6, torch.float64)
    for row, position in enumerate((0, 1, 7)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[0, row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-15)
            assert table[0, row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-15)
    assert sinusoids(torch.arange(3), 5).shape == (3, 5)
    assert sinusoids(torch.arange(3), 4, torch.bfloat16).dtype == torch.bfloat16


def test_lengths_of_segments():
    segments = torch.tensor([[3, 3, 3, 1, 2, 2], [0, 0, 0, 0, 0, -1]])
    assert lengths_of_segments(segments).tolist() == [[3, 3, 3, 1, 2, 2], [5, 5, 5, 5, 5, 1]]
