"""Padded calls with dropout as softmax of whole rows: the error rule, the blockwise way's results, bits."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_inputs import masked
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends.torch import whole_rows
from numerics import assert_each_within_rule

BATCH, HEADS, QUERIES, KEYS = 3, 4, 23, 30


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (4, 3)},
    "scale": {"scale": 0.3},
    "mask of pairs": {"mask": masked(QUERIES, KEYS)},
    "mask of sequences": {"mask": masked(BATCH, 1, 1, KEYS)},
    "mask of heads": {"mask": masked(HEADS, QUERIES, KEYS), "causal": True},
    "mask of all": {"mask": masked(BATCH, HEADS, QUERIES, KEYS)},
}


def operands(kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value and the gradients of out and lse."""
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, QUERIES, 16), (kv_heads, KEYS, 16), (kv_heads, KEYS, 12), (HEADS, QUERIES, 12)
    made = [torch.randn(BATCH, *shape, generator=generator).to(dtype) for shape in shapes]
    return [*made, torch.randn(BATCH, HEADS, QUERIES, generator=generator)]


def results(attend: Any, tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """out, lse and the gradients of query, key and value."""
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    out, lse = attend(*leaves, **options, return_lse=True, dropout_p=0.2, dropout_seed=7)
    grads = torch.autograd.grad((out, lse), leaves, [t.to(o.dtype) for t, o in zip(tensors[3:], (out, lse))])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads)))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass that came here, whether it gave the result."""
    found: list[bool] = []
    for name in ("attention_fwd", "attention_bwd"):
        run = getattr(whole_rows, name)

        def seen(*args: Any, run: Any = run) -> Any:
            result = run(*args)
            found.append(result is not None)
            return result

        monkeypatch.setattr(whole_rows, name, seen)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name: str, kv_heads: int, dtype: torch.dtype, taken: list[bool]) -> None:
    tensors = operands(kv_heads, dtype)
    actual = results(fastattn.attention, tensors, **OPTIONS[name], backend="torch")
    assert taken == [True, True]

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(reference.attention, [t.to(dtype) for t in tensors], **OPTIONS[name])

    assert_each_within_rule(actual, lambda: formula(dtype), formula(torch.float64), name, dtype)


@pytest.mark.parametrize("elements", [1, QUERIES * KEYS, 2 * QUERIES * KEYS, 5 * QUERIES * KEYS])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_how_many_run_together_changes_no_bit(
    name: str, kv_heads: int, elements: int, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = operands(kv_heads)
    expected = results(fastattn.attention, tensors, **OPTIONS[name], backend="torch")
    monkeypatch.setattr(whole_rows, "can_run", lambda spec, call: True)
    monkeypatch.setattr(whole_rows, "ELEMENTS", elements)
    found = results(fastattn.attention, tensors, **OPTIONS[name], backend="torch")
    assert taken == [True] * 4
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("layout", ["BSHD", "HBSD"])
def test_any_layout(layout: str) -> None:
    tensors = operands(2)
    expected = results(fastattn.attention, tensors, causal=True, backend="torch")
    dims = (0, 2, 1, 3) if layout == "BSHD" else (1, 0, 2, 3)  # each its own inverse
    others = [t.permute(dims).contiguous().permute(dims) for t in tensors[:4]]
    found = results(fastattn.attention, [*others, tensors[4]], causal=True, backend="torch")
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert found["out"].permute(dims).is_contiguous()


def test_rows_that_see_nothing_run_by_blocks(taken: list[bool]) -> None:
    tensors = operands(4)
    mask = masked(QUERIES, KEYS)
    mask[5] = False
    found = results(fastattn.attention, tensors, mask=mask, backend="torch")
    assert not any(taken)
    assert not found["out"][:, :, 5].any()
    assert bool((found["lse"][:, :, 5] == -math.inf).all())

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(reference.attention, [t.to(dtype) for t in tensors], mask=mask)

    assert_each_within_rule(
        found, lambda: formula(torch.float32), formula(torch.float64), "a row of none", torch.float32
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_no_query_sees_may_be_anything(bad: float, taken: list[bool]) -> None:
    tensors = operands(4)
    mask = masked(QUERIES, KEYS)
    mask[:, 9] = False
    expected = results(fastattn.attention, tensors, mask=mask, backend="torch")
    for operand in tensors[1:3]:
        operand[:, :, 9] = bad
    found = results(fastattn.attention, tensors, mask=mask, backend="torch")
    assert taken[2] is False
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_calls_of_more_weights_run_by_blocks(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(2)
    whole = results(fastattn.attention, tensors, backend="torch")
    monkeypatch.setattr(whole_rows, "ELEMENTS", 2 * (2 * QUERIES * KEYS) - 1)  # two queries share a key head
    by_blocks = results(fastattn.attention, tensors, backend="torch")
    assert taken == [True, True]
    for key, value in whole.items():
        torch.testing.assert_close(by_blocks[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["a row of none", "nan"])
def test_another_sequence_changes_no_bit(kind: str, dropout_p: float, dtype: torch.dtype) -> None:
    tensors = [
        torch.randn(3, 4, 40, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)
    ]
    mask = torch.ones(3, 1, 1, 40, dtype=torch.bool)
    if kind == "nan":
        tensors[0][1, 0, 3] = math.nan
    else:
        mask[1, ..., :5] = False  # padding on the left, where causal rows see nothing

    def run(rows: slice) -> list[Tensor]:
        leaves = [t[rows].clone().requires_grad_() for t in tensors[:3]]
        seed = 3 if dropout_p else None
        options: dict[str, Any] = {
            "mask": mask[rows],
            "causal": True,
            "dropout_p": dropout_p,
            "dropout_seed": seed,
        }
        out = fastattn.attention(*leaves, **options, backend="torch")
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3][rows])]

    for together, alone in zip(run(slice(0, 3)), run(slice(0, 1))):
        assert torch.equal(together[:1], alone)


def test_threads_and_modes_share_nothing() -> None:
    """Scores lie in memory that a thread uses again, first written in inference mode here."""
    many = [[t * (1 + 0.1 * i) for t in operands(2)] for i in range(8)]
    expected = [results(fastattn.attention, tensors, causal=True, backend="torch") for tensors in many]

    def run(number: int) -> bool:
        with torch.inference_mode():
            fastattn.attention(*many[number][:3], dropout_p=0.2, dropout_seed=7, backend="torch")
        order = [(number + i) % len(many) for i in range(2 * len(many))]
        found = ((i, results(fastattn.attention, many[i], causal=True, backend="torch")) for i in order)
        return all(torch.equal(value, expected[i][name]) for i, of in found for name, value in of.items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(len(many))))


def test_memory_is_used_again() -> None:
    """Of a kind there is one tensor in a thread, as large as the largest that was asked for."""
    with ThreadPoolExecutor(1) as pool:  # a thread that has none

        def addresses() -> list[int]:
            asked = [(2, 3), (4, 8), (3, 5), (4, 8)]
            return [whole_rows.shared("scores", shape, torch.float32).data_ptr() for shape in asked]

        first, *rest = pool.submit(addresses).result()
        assert len(set(rest)) == 1
        other = pool.submit(lambda: whole_rows.shared("weights", (4, 8), torch.float32).data_ptr()).result()
    assert other not in (first, rest[0])
