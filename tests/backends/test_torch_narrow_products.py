"""Backward passes whose products are of bfloat16 itself, as on processors with instructions for matrices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_inputs import masked
from torch import Tensor

import fastattn
from fastattn import reference, torch_compat
from fastattn.backends.torch import whole_rows
from fastattn.backends.torch.dense import NARROW_FUSED_BWD_MIN_KEYS, fused_bwd_min_keys
from fastattn.backends.torch.parts import COL_BLOCK
from numerics import assert_each_within_rule

BATCH, HEADS, DIM = 3, 4, 32
# of this processor, whatever a test pretends
HAS_MATRIX_INSTRUCTIONS = torch_compat.has_matrix_instructions()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (20, 7)},
    "scale": {"scale": 1.5},  # scores of about 10, which are rounded coarsely
    "mask of pairs": {"mask": masked(48, 70)},
    "mask of all": {"mask": masked(BATCH, HEADS, 48, 70)},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 7},
    "dropout, causal": {"dropout_p": 0.2, "dropout_seed": 7, "causal": True},
}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of a processor with instructions for matrices, the dtype of each backward's products."""
    if not torch_compat.has_fast_products(torch.bfloat16):
        pytest.skip("oneDNN has no products of bfloat16 here, and they are never chosen")
    monkeypatch.setattr(torch_compat, "has_matrix_instructions", lambda: True)
    found: list[torch.dtype] = []
    run = whole_rows.Matrices.backward

    def seen(self: whole_rows.Matrices, *args: Any) -> Any:
        found.append(self.query.dtype)
        return run(self, *args)

    monkeypatch.setattr(whole_rows.Matrices, "backward", seen)
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is what it was afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands(
    kv_heads: int, rows: int = 48, cols: int = 70, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """query, key, value and the gradient of out."""
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, rows, DIM), (kv_heads, cols, DIM), (kv_heads, cols, DIM), (HEADS, rows, DIM)
    return [torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in shapes]


def gradients(attend: Any, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Of query, key and value."""
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    out = attend(*leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name: str, kv_heads: int, products: list[torch.dtype]) -> None:
    tensors, options = operands(kv_heads), OPTIONS[name]
    actual = gradients(fastattn.attention, tensors, **options, backend="torch")
    assert set(products) == {torch.bfloat16}

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return gradients(reference.attention, [t.to(dtype) for t in tensors], **options)

    assert_each_within_rule(
        actual, lambda: formula(torch.bfloat16), formula(torch.float64), name, torch.bfloat16
    )


@pytest.mark.parametrize("length", [33, 191, 192, 512])
def test_against_float64_of_many_keys(length: int, products: list[torch.dtype]) -> None:
    tensors = [t[:1] for t in operands(HEADS, length, length)]
    actual = gradients(fastattn.attention, tensors, causal=True, backend="torch")
    assert set(products) == {torch.bfloat16}

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return gradients(reference.attention, [t.to(dtype) for t in tensors], causal=True)

    assert_each_within_rule(
        actual, lambda: formula(torch.bfloat16), formula(torch.float64), str(length), torch.bfloat16
    )


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool, products: list[torch.dtype]) -> None:
    lengths = [40, 17, 90, 33]
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (
        torch.randn(int(edges[-1]), HEADS, DIM, generator=generator).bfloat16() for _ in range(4)
    )
    options: dict[str, Any] = {"max_seqlen_q": 90, "max_seqlen_k": 90, "causal": causal}
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = fastattn.attention_varlen(*leaves, edges, edges, **options, backend="torch")
    found = torch.autograd.grad(out, leaves, dout)
    assert products
    assert set(products) == {torch.bfloat16}
    for start, stop in pairwise(edges.tolist()):
        of_one = [t[start:stop].transpose(0, 1)[None] for t in (q, k, v, dout)]

        def formula(dtype: torch.dtype, of_one: list[Tensor] = of_one) -> dict[str, Tensor]:
            return gradients(reference.attention, [t.to(dtype) for t in of_one], causal=causal)

        actual = {name: t[start:stop].transpose(0, 1)[None] for name, t in zip(("dq", "dk", "dv"), found)}
        assert_each_within_rule(
            actual, lambda: formula(torch.bfloat16), formula(torch.float64), "packed", torch.bfloat16
        )


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("length", [33, 64, 200, 300])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_sequence_has_the_same_bits_alone(
    dropout_p: float, length: int, num_threads: int, products: list[torch.dtype], threads: None
) -> None:
    if not HAS_MATRIX_INSTRUCTIONS:
        pytest.skip("other products than those that would be chosen")
    torch.set_num_threads(num_threads)
    tensors = operands(2, length, length)
    options: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": 3} if dropout_p else {}

    def run(rows: slice) -> dict[str, Tensor]:
        return gradients(
            fastattn.attention, [t[rows] for t in tensors], causal=True, backend="torch", **options
        )

    together, alone = run(slice(0, 3)), run(slice(0, 1))
    assert set(products) == {torch.bfloat16}
    for name, value in alone.items():
        assert torch.equal(together[name][:1], value), name


@pytest.mark.parametrize(
    ("dtype", "rows", "wants_lse"),
    [
        (torch.float32, 48, False),
        (torch.float16, 48, False),
        (torch.bfloat16, 48, True),
        (torch.bfloat16, 15, False),
    ],
    ids=["float32", "float16", "a gradient of lse", "few rows"],
)
def test_other_products_are_of_the_accumulation_dtype(
    dtype: torch.dtype, rows: int, wants_lse: bool, products: list[torch.dtype]
) -> None:
    leaves = [t.requires_grad_() for t in operands(2, rows, dtype=dtype)[:3]]
    out, lse = fastattn.attention(*leaves, dropout_p=0.1, dropout_seed=1, return_lse=True, backend="torch")
    (out.sum() + (lse.sum() if wants_lse else 0.0)).backward()
    assert set(products) == {torch.float32}


def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.requires_grad_() for t in operands(2)[:3])
    for has, most in ((True, COL_BLOCK), (False, NARROW_FUSED_BWD_MIN_KEYS - 1)):
        monkeypatch.setattr(torch_compat, "has_matrix_instructions", lambda has=has: has)
        assert fused_bwd_min_keys(torch.bfloat16) == most + 1
        assert fused_bwd_min_keys(torch.float16) == NARROW_FUSED_BWD_MIN_KEYS
        assert (whole_rows.product_dtype(torch.bfloat16, 48, False) == torch.bfloat16) == has
        said = fastattn.explain(q, k, v).backward_tiles
        assert said is not None
        assert f"up to {most} keys and {whole_rows.ELEMENTS // 2} weights of a key head" in said
