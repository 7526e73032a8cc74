"""The layouts that a backend may rely on: tensors are copied to them once, and kept where they have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import stride_cases
import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import layout
from fastattn.spec import AttentionCall, AttentionSpec, CrossEntropyCall, KVCacheCall, VarlenCall
from fastattn.strides import (
    ALIGNED,
    DESCRIBABLE,
    UNALIGNED,
    has_adjacent_columns,
    is_expanded,
    row_class,
)

HALF, INT32 = torch.float16, torch.int32


def heads(length: int = 6) -> Tensor:
    return torch.randn(2, 1, length, 8).to(HALF).repeat(1, 2, 1, 1)  # equal heads, so they can be expanded


def attention_call() -> AttentionCall:
    return AttentionCall(
        heads(), heads(), heads(), mask=torch.ones(2, 2, 6, 6, dtype=torch.bool), bias=torch.zeros(2, 2, 6, 6),
        query_segments=torch.zeros(2, 6, dtype=INT32), key_segments=torch.zeros(2, 6, dtype=INT32),
        key_lengths=torch.full((2,), 6, dtype=INT32), alibi_slopes=torch.ones(2, 2), sinks=torch.ones(2),
        dropout_seed=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip


def varlen_call() -> VarlenCall:
    query, key, value = (t[0].transpose(0, 1).contiguous() for t in (heads(), heads(), heads()))
    cu_seqlens = torch.tensor([0, 2, 6], dtype=INT32)
    return VarlenCall(query, key, value, cu_seqlens, cu_seqlens, torch.ones(2, 2), torch.ones(2))


def cache_call() -> KVCacheCall:
    return KVCacheCall(
        heads(1), heads(8), heads(8), torch.zeros(2, dtype=INT32), heads(1), heads(1),
        torch.zeros(2, 2, dtype=INT32), torch.ones(8, 4), torch.ones(8, 4), torch.ones(2, 2), torch.ones(2),
    )  # fmt: skip


def loss_call() -> CrossEntropyCall:
    return CrossEntropyCall(torch.ones(3, 8).to(HALF), torch.zeros(3).long(), -100, 0.0, torch.ones(8))


CALLS: dict[str, Callable[[], Any]] = {
    "attention": attention_call, "varlen": varlen_call, "kv_cache": cache_call, "cross_entropy": loss_call,
}  # fmt: skip


def tensors_of(call: Any) -> dict[str, Tensor]:
    made = {field.name: getattr(call, field.name) for field in fields(call)}
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def spec_of(call: Any) -> AttentionSpec | None:
    if isinstance(call, KVCacheCall):
        call = call.attending(call.query, call.k_cache, call.v_cache, call.alibi_slopes)
    if isinstance(call, VarlenCall):
        call = call.as_one_sequence()
    return AttentionSpec.of(call) if isinstance(call, AttentionCall) else None


def normalised(backend: ModuleType, call: Any) -> Any:
    call = layout.operands(call)
    return layout.for_backend(backend, call, spec_of(call))


def test_every_tensor_of_every_call_has_a_place() -> None:
    """Exactly one, so that whoever adds a field has to choose it."""
    for kind, of_kind in layout.LAYOUTS.items():
        named = [name for group in of_kind for name in group]
        assert sorted(named) == sorted(f.name for f in fields(kind) if "Tensor" in str(f.type)), kind
    for backend in backends.BACKENDS:
        assert backend.LAYOUT in (layout.STRIDED, layout.ROWS, layout.UNEXPANDED)


@pytest.mark.parametrize("backend", backends.BACKENDS, ids=backends.NAMES)
@pytest.mark.parametrize("op", CALLS)
def test_good_layouts_are_left_alone(op: str, backend: ModuleType) -> None:
    call = CALLS[op]()
    assert normalised(backend, call) is call


@pytest.mark.parametrize("backend", backends.BACKENDS, ids=backends.NAMES)
@pytest.mark.parametrize("op", CALLS)
def test_what_a_backend_may_rely_on(op: str, backend: ModuleType) -> None:
    good, of_kind = CALLS[op](), layout.LAYOUTS[type(CALLS[op]())]
    for name, tensor in tensors_of(good).items():
        for made in stride_cases.LAYOUTS.values():
            try:
                odd = made(tensor)
            except StopIteration:  # not constant along any dimension
                continue
            call = CALLS[op]()
            for other, t in tensors_of(good).items():
                object.__setattr__(call, other, odd if other == name else t)
            result = normalised(backend, call)
            spec, found = spec_of(layout.operands(call)), getattr(result, name)
            where = f"{name}, {made.__name__}"
            assert torch.equal(found, tensor), where
            if name in of_kind.strided:
                assert found is odd, where
            if name in of_kind.operands:
                assert has_adjacent_columns(found), where
                assert backend.LAYOUT < layout.UNEXPANDED or not is_expanded(found), where
            if backend.LAYOUT >= layout.ROWS:
                assert name not in of_kind.small or found.is_contiguous(), where
                if name in (*of_kind.tables, *of_kind.appended):
                    assert has_adjacent_columns(found), where
                if name in of_kind.appended and spec is not None and spec.aligned:
                    assert row_class(found) >= ALIGNED, where


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", [layout.STRIDED, layout.ROWS, layout.UNEXPANDED])
def test_what_comes_from_upstream(level: int, packed: bool) -> None:
    backend: Any = SimpleNamespace(LAYOUT=level)
    call = varlen_call().as_one_sequence() if packed else attention_call()
    spec = AttentionSpec.of(call)
    assert spec.aligned
    assert spec.describable
    out = heads()
    lse, dlse = torch.zeros(2, 2, 6), torch.zeros(2, 2, 6)
    if packed:
        out, lse, dlse = out[0].transpose(0, 1).contiguous(), lse[0], dlse[0]
    same = layout.upstream(backend, spec, out, lse, out, dlse)
    assert same[0] is spec
    assert all(one is other for one, other in zip(same[1:], (out, lse, out, dlse)))
    for made in stride_cases.LAYOUTS.values():
        odd, odd_rows = made(out), made(lse)
        for result, of_rows in ((odd, odd_rows), (out, odd_rows), (odd, lse)):
            found, *residuals = layout.upstream(backend, spec, result, of_rows, odd, of_rows)
            for actual, expected in zip(residuals, (out, lse, out, dlse)):
                assert torch.equal(actual, expected)
            results = residuals[0], residuals[2]
            assert has_adjacent_columns(results[1])
            assert residuals[1].is_contiguous()
            if level >= layout.ROWS:
                assert has_adjacent_columns(results[0])
                assert residuals[3].is_contiguous()
                rows = min(row_class(t.transpose(0, 1)[None] if packed else t) for t in results)
                assert rows >= (ALIGNED if found.aligned else UNALIGNED)
                assert rows >= (DESCRIBABLE if found.describable else UNALIGNED)
            if level == layout.UNEXPANDED:
                assert found is spec
                assert not any(map(is_expanded, results))


def test_row_classes() -> None:
    dense = torch.zeros(2, 3, 4, 8, dtype=HALF)
    assert row_class(dense) == DESCRIBABLE
    assert row_class(dense.transpose(1, 2)) == DESCRIBABLE
    assert row_class(dense[..., :5]) == DESCRIBABLE
    assert row_class(dense[..., 1:]) == UNALIGNED
    assert row_class(dense[:, :, :, :5].contiguous()) == UNALIGNED
    assert row_class(torch.zeros(1, 1, 1, 5, dtype=HALF)) == ALIGNED  # a single row
    assert row_class(dense[:, :1].expand(2, 3, 4, 8)) == ALIGNED
    assert row_class(dense[:, :, :0]) == ALIGNED
    assert row_class(dense.mT.contiguous().mT) == DESCRIBABLE  # kernels get a dense copy
    assert row_class(dense[..., :5].mT.contiguous().mT) == UNALIGNED
    assert row_class(dense.float()[..., :4]) == DESCRIBABLE
    cut_out = torch.zeros(200, dtype=HALF).as_strided((2, 3, 4, 8), (97, 32, 8, 1))[:1]
    assert cut_out.is_contiguous()
    # as the batch that it is cut out of, whose second entry is at no multiple of 16 bytes
    assert row_class(cut_out) == ALIGNED


def test_the_specs_carry_alignment() -> None:
    query = heads()
    whole = AttentionSpec.of(AttentionCall(query, query, query))
    assert (whole.aligned, whole.describable, whole.unit, whole.fits_tma) == (True, True, 8, True)
    assert not whole.replace(arch=80).fits_tma
    assert whole.replace(arch=90).fits_tma
    expanded = AttentionSpec.of(AttentionCall(query, query[:, :1].expand(2, 2, 6, 8), query))
    assert (expanded.aligned, expanded.describable, expanded.unit, expanded.fits_tma) == (
        True,
        False,
        8,
        False,
    )
    moved = AttentionSpec.of(AttentionCall(query, query, stride_cases.misplaced(query)))
    assert (moved.aligned, moved.describable, moved.unit) == (False, False, 1)
    assert whole.with_rows(query) is whole
    assert whole.with_rows(query, stride_cases.misplaced(query)) == moved
    narrow = AttentionSpec.of(AttentionCall(*(query[..., :5] for _ in range(3))))
    assert (narrow.aligned, narrow.unit) == (True, 1)  # dense results of 5 columns are not aligned
    wide = AttentionSpec.of(AttentionCall(*(query.float() for _ in range(3))))
    assert (wide.unit, wide.fits_tma) == (4, False)
    assert not AttentionSpec.of(AttentionCall(query, query[:, :, :0], query[:, :, :0])).describable
