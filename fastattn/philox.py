"""The dropout stream every backend shares: Philox4x32-10 addressed by (batch * H + head, query, key)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.integers import cdiv

KEYS_PER_CALL = 8  # one Philox call yields four 32-bit words, so eight 16-bit halves
ROUNDS = 10
LOW32 = 0xFFFFFFFF
MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
TOP_BITS = 0x8000800080008000 - 2**64  # of four 16-bit halves, as a signed 64-bit integer


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 of Salmon et al. (SC 2011) on four counter words and two key words.

    Words are int64 tensors holding values below 2**32, broadcast against each other: a word that depends on few
    coordinates stays small until a round mixes it, so the first rounds of a grid of counters cost little.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap modulo 2**64, which keeps every bit. Their low words need no mask: the only operation
        # before the next product is an xor, whose result is masked once.
        product0, product1 = c0 * MULTIPLIER[0], c2 * MULTIPLIER[1]
        c0 = _xor_high(product1, c1 ^ k0)
        c2 = _xor_high(product0, c3 ^ k1)
        c1, c3 = product1, product0
        k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
    return [c0, c1 & LOW32, c2, c3 & LOW32]


def _xor_high(product: Tensor, other: Tensor) -> Tensor:
    """The high word of each product xor `other`, without temporaries where shapes and transforms allow."""
    high = product >> 32
    if _holds(high.shape, other.shape) and not torch_compat.transforms_active((high, other)):
        return high.bitwise_xor_(other).bitwise_and_(LOW32)
    return (high ^ other).bitwise_and_(LOW32)


def _holds(shape: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes that broadcast together give the first. torch.broadcast_shapes takes longer than a round."""
    return len(other) <= len(shape) and all(n in (1, m) for m, n in zip(reversed(shape), reversed(other)))


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator, on the device, so that a replayed CUDA graph draws a new one."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """A key is kept iff its 16-bit half is at least this: round(65536 p), within 1..65535 for p > 0."""
    if dropout_p <= 0.0:
        return 0
    return min(max(round(65536 * dropout_p), 1), 65535)


def keep_scale(dropout_p: float) -> float:
    """The factor of kept values: 65536 / (65536 - threshold)."""
    return 65536 / (65536 - keep_threshold(dropout_p))


def keep_mask(seed: Tensor, heads: Tensor, rows: range, cols: range, dropout_p: float) -> Tensor:
    """Which weights survive dropout.

    Args:
        seed: one int64 element; its low and high 32 bits are the Philox key.
        heads: integer tensor of b * H + h, any shape.
        rows: queries. Counter word 1.
        cols: keys. Counter word 0 is key // 8; key j takes half j % 8 (word (j % 8) // 2, low half first).
        dropout_p: probability of dropping.

    Returns:
        bool (*heads.shape, len(rows), len(cols)); True = keep.
    """
    device = heads.device
    seed = seed.reshape(()).to(device)
    first_call, last_call = cols.start // KEYS_PER_CALL, cdiv(cols.stop, KEYS_PER_CALL)
    calls = torch.arange(first_call, max(last_call, first_call), device=device)
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None]
    heads = heads.to(torch.int64)[..., None, None]
    words = torch.broadcast_tensors(
        *philox_4x32((calls, queries, heads, torch.zeros_like(calls)), (seed & LOW32, (seed >> 32) & LOW32))
    )
    if torch_compat.transforms_active(words):  # which have no view as another dtype
        halves = (
            torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1) - 0x8000
        )
    else:
        # Eight halves in the order of their keys, side by side in two int64; with the top bit flipped, unsigned
        # halves compare as signed ones.
        pairs = torch.stack([low | (high << 32) for low, high in (words[:2], words[2:])], dim=-1)
        halves = pairs.bitwise_xor_(TOP_BITS).view(torch.int16)
    keep = (halves >= keep_threshold(dropout_p) - 0x8000).flatten(-2)
    offset = cols.start - first_call * KEYS_PER_CALL
    return keep[..., offset : offset + len(cols)]
