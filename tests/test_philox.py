"""Philox4x32-10 against its published vectors, and the keep-mask against the formula in Python integers."""

from __future__ import annotations

import pytest
import torch

from fastattn.philox import draw_seed, keep_mask, keep_scale, keep_threshold, philox_4x32

LOW32 = 0xFFFFFFFF

# counter, key, result: the known answers that come with the Random123 library
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW32,) * 4, (LOW32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & LOW32, (a >> 32) ^ c[3] ^ k1, a & LOW32]
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox_4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert [int(word) for word in words] == list(expected)
    assert philox_in_integers(counter, key) == list(expected)


@pytest.mark.parametrize("seed", [0, 7, -1, -1234567890123456789, 2**62 + 12345])
@pytest.mark.parametrize(("rows", "cols"), [(range(5), range(17)), (range(3, 9), range(5, 40))])
def test_every_weight_has_its_own_half(seed: int, rows: range, cols: range) -> None:
    p = 0.37
    keep = keep_mask(torch.tensor([seed]), torch.arange(6).view(2, 3), rows, cols, p)
    assert keep.shape == (2, 3, len(rows), len(cols))
    key = (seed & LOW32, (seed >> 32) & LOW32)
    for head in range(6):
        for i in rows:
            for j in cols:
                word = philox_in_integers((j // 8, i, head, 0), key)[(j % 8) // 2]
                half = (word >> 16) if j % 2 else word & 0xFFFF
                kept = bool(keep[head // 3, head % 3, i - rows.start, j - cols.start])
                assert kept == (half >= keep_threshold(p))


def test_golden_mask() -> None:
    """The stream may never change: models are resumed and compared across versions and backends."""
    keep = keep_mask(torch.tensor([2026]), torch.arange(2), range(2), range(16), 0.5)
    bits = ["".join(str(int(b)) for b in row) for row in keep.reshape(-1, 16)]
    expected = []
    for head in range(2):
        for i in range(2):
            row = ""
            for j in range(16):
                word = philox_in_integers((j // 8, i, head, 0), (2026, 0))[(j % 8) // 2]
                row += str(int(((word >> 16) if j % 2 else word & 0xFFFF) >= 32768))
            expected.append(row)
    assert bits == expected
    assert bits == GOLDEN_BITS


GOLDEN_BITS = ["0011111011001011", "0110101011010111", "1100011111110111", "0011001111110110"]


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.0, 0), (1e-9, 1), (0.1, 6554), (0.5, 32768), (0.99999, 65535), (1 - 1e-12, 65535)]
)
def test_thresholds(p: float, threshold: int) -> None:
    assert keep_threshold(p) == threshold
    assert keep_scale(p) == 65536 / (65536 - threshold)


def test_rate_is_what_was_asked_for() -> None:
    keep = keep_mask(torch.tensor([1]), torch.arange(8), range(256), range(256), 0.1)
    deviation = (0.1 * 0.9 / keep.numel()) ** 0.5
    assert abs((~keep).double().mean().item() - 6554 / 65536) < 5 * deviation


def test_nothing_to_mask() -> None:
    assert keep_mask(torch.tensor([1]), torch.arange(2), range(0), range(5), 0.1).shape == (2, 0, 5)
    assert keep_mask(torch.tensor([1]), torch.arange(2), range(3), range(0), 0.1).shape == (2, 3, 0)


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
