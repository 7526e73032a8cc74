"""The oracle against the contract's text in scalar Python, and against torch's own attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import CASES, Case, Inputs
from torch import Tensor

from fastattn import reference
from fastattn.philox import keep_scale, keep_threshold, philox_4x32

SMALL = {"seqlen_q": 5, "seqlen_k": 7, "head_dim": 3, "value_dim": 2}


def _entry(tensor: Tensor, *index: int) -> Tensor:
    """tensor[index] with broadcasting: the trailing dimensions count, sizes of 1 repeat."""
    trailing = index[len(index) - tensor.dim() :]
    return tensor[tuple(0 if size == 1 else i for size, i in zip(tensor.shape, trailing))]


def scalar_attention(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights), one score at a time, in the order the contract's sentences have."""
    batch, heads, seqlen_q, dim = query.shape
    kv_heads, seqlen_k = key.shape[1:3]
    causal, window = options.get("causal", False), options.get("window") or (None, None)
    left, right = (None if side in (None, -1) else side for side in window)
    out = torch.zeros(batch, heads, seqlen_q, value.shape[3], dtype=query.dtype)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=query.dtype)
    weights = torch.zeros(batch, heads, seqlen_q, seqlen_k, dtype=query.dtype)
    scale = dim**-0.5 if options.get("scale") is None else options["scale"]
    p = options.get("dropout_p", 0.0)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                pos = i if causal == "top_left" else i + seqlen_k - seqlen_q
                scores: dict[int, float] = {}
                for j in range(seqlen_k):
                    if causal and j > pos:
                        continue
                    if left is not None and j < pos - left:
                        continue
                    if right is not None and j > pos + right:
                        continue
                    if options.get("mask") is not None and not _entry(options["mask"], b, h, i, j):
                        continue
                    if options.get("key_lengths") is not None and j >= options["key_lengths"][b]:
                        continue
                    if options.get("segment_ids") is not None:
                        ids = options["segment_ids"]
                        ids_q, ids_k = ids if isinstance(ids, tuple) else (ids, ids)
                        if ids_q[b, i] != ids_k[b, j] or ids_q[b, i] < 0:
                            continue
                    score = scale * float(query[b, h, i] @ key[b, h // (heads // kv_heads), j])
                    if options.get("softcap"):
                        score = options["softcap"] * math.tanh(score / options["softcap"])
                    if options.get("alibi_slopes") is not None:
                        score -= float(_entry(options["alibi_slopes"], b, h)) * abs(pos - j)
                    if options.get("bias") is not None:
                        score += float(_entry(options["bias"], b, h, i, j))
                    if score > -math.inf:
                        scores[j] = score
                columns = list(scores.values())
                if options.get("sinks") is not None:
                    columns.append(float(options["sinks"][h]))
                if not columns:
                    continue
                lse[b, h, i] = math.log(math.fsum(math.exp(s - max(columns)) for s in columns)) + max(columns)
                for j, score in scores.items():
                    weight = math.exp(score - float(lse[b, h, i]))
                    if p:
                        counter = (j // 8, i, b * heads + h, 0)
                        seed = options["dropout_seed"]
                        words = philox_4x32(
                            tuple(map(torch.tensor, counter)),  # type: ignore[arg-type]
                            (torch.tensor(seed & 0xFFFFFFFF), torch.tensor((seed >> 32) & 0xFFFFFFFF)),
                        )
                        half = (int(words[(j % 8) // 2]) >> (16 * (j % 2))) & 0xFFFF
                        weight = weight * keep_scale(p) if half >= keep_threshold(p) else 0.0
                    weights[b, h, i, j] = weight
                    out[b, h, i] += weight * value[b, h // (heads // kv_heads), j]
    return out, lse, weights


def _shrunk(tensor: Any, case: Case) -> Any:
    """An option's tensor cut to the small sizes."""
    if isinstance(tensor, tuple) and tensor and isinstance(tensor[0], Tensor):
        return tuple(_shrunk(t, case) for t in tensor)
    if not isinstance(tensor, Tensor):
        return tensor
    sizes = {case.seqlen_q: 5, case.seqlen_k: 7}
    for dim, size in enumerate(tensor.shape):
        tensor = tensor.narrow(dim, 0, sizes.get(size, size))
    return tensor


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.seqlen_q == 70 and c.seqlen_k == 83 and c.batch], ids=str
)
def test_reference_is_the_contract(case: Case) -> None:
    options = {name: _shrunk(value, case) for name, value in Inputs.of(case, torch.float64).options.items()}
    if "key_lengths" in options:
        options["key_lengths"] = options["key_lengths"] % 8
    torch.manual_seed(3)
    query = torch.randn(2, case.heads, 5, 3, dtype=torch.float64)
    key = torch.randn(2, case.kv_heads, 7, 3, dtype=torch.float64)
    value = torch.randn(2, case.kv_heads, 7, 2, dtype=torch.float64)
    results = reference.attention(query, key, value, **options, return_lse=True, return_weights=True)
    for name, actual, expected in zip(
        ("out", "lse", "weights"), results, scalar_attention(query, key, value, **options)
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_agrees_with_torch(causal: bool | str, masked: bool) -> None:
    if causal and masked:
        pytest.skip("torch takes one of them")
    q, k, v = (torch.randn(2, 3, s, 8, dtype=torch.float64, requires_grad=True) for s in (6, 9, 9))
    mask = torch.rand(2, 1, 6, 9) < 0.6 if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bool(causal)
    )
    actual = reference.attention(q, k, v, causal=causal, mask=mask)
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "window both sides",
        "mask with empty rows",
        "bias",
        "unsorted and negative segments",
        "lengths",
        "everything",
    ],
)
def test_reference_gradients_by_finite_differences(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = Inputs.of(case, torch.float64)
    options = {key: _shrunk(value, case) for key, value in inputs.options.items()}
    if "key_lengths" in options:
        options["key_lengths"] = options["key_lengths"] % 8
    floats = {
        key: options.pop(key).double().requires_grad_()
        for key in ("bias", "alibi_slopes", "sinks")
        if key in options
    }
    shapes = ((2, case.heads, 5, 3), (2, case.kv_heads, 7, 3), (2, case.kv_heads, 7, 2))
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention(q, k, v, **options, **dict(zip(floats, rest)), return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(attend, (*operands, *floats.values()), fast_mode=True)
