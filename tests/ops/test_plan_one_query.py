"""Plans of calls of one query: bits with and without them, masks of keys, the error rule, and what hidden keys hold."""

from __future__ import annotations

import pytest
import torch
from plan_cases import assert_same, attended, heads, in_order, with_grads

import fastattn
from fastattn import reference
from fastattn.backends import torch_backend
from fastattn.ops import plan
from numerics import assert_attention_within_rule, assert_within_rule

KEYS = 40
SEEN = torch.arange(KEYS) >= torch.tensor([[9], [0]])  # left padding, (2, keys)
MASKS = {
    "none": None,
    "of each sequence": SEEN[:, None, None],
    "of all": (torch.arange(KEYS) % 3 > 0)[None, None, None],
    "of each head": SEEN[:, None, None] & (torch.arange(4)[:, None, None] != torch.arange(KEYS) % 4),
    "of a sequence that sees nothing": (SEEN & torch.tensor([[True], [False]]))[:, None, None],
    "of fewer dimensions": torch.arange(KEYS) < 30,
}


def options_of(name: str, return_lse: bool) -> dict[str, object]:
    mask = MASKS[name]
    return {"return_lse": return_lse} | ({} if mask is None else {"mask": mask})


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("kv_heads", "dim"), [(4, 16), (2, 16), (1, 16), (2, 128)])
@pytest.mark.parametrize("name", MASKS)
def test_bits_through_a_plan_are_those_without(
    name: str,
    kv_heads: int,
    dim: int,
    return_lse: bool,
    threads: int,
    hits: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(name, return_lse)
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (False, True):
            for made in (
                heads(dtype, 1, KEYS, kv_heads, dim),
                in_order(heads(dtype, 1, KEYS, kv_heads, dim)),
            ):
                tensors = [t.requires_grad_(grad) for t in made]
                plan.clear()
                monkeypatch.setenv("FASTATTN_DISABLE", "plan")
                expected = with_grads(attended, tensors, options)
                monkeypatch.delenv("FASTATTN_DISABLE")
                for _ in range(3):
                    assert_same(with_grads(attended, tensors, options), expected)
                assert hits[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", [name for name in MASKS if MASKS[name] is not None])
def test_masked_keys_keep_the_error_rule(name: str, kv_heads: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(1)
    tensors = heads(dtype, 1, KEYS, kv_heads, 64)
    options = options_of(name, True)
    for _ in range(3):
        results = fastattn.attention(*tensors, **options)
    del options["return_lse"]
    assert_attention_within_rule(results, tensors, name, **options)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["key", "value"])
def test_what_a_hidden_key_holds_reaches_no_result(which: str, number: float, hits: list[bool]) -> None:
    query, key, value = heads(torch.float32, 1, KEYS, 2, 16)
    mask = MASKS["of each sequence"]
    expected = [fastattn.attention(query, key, value, mask=mask, return_lse=True) for _ in range(3)][-1]
    assert hits[-1]
    {"key": key, "value": value}[which][0, :, 3] = number  # hidden
    found = fastattn.attention(query, key, value, mask=mask, return_lse=True)
    assert hits[-1]
    assert_same(list(found), list(expected))
    {"key": key, "value": value}[which][1, :, 3] = number  # seen
    out, lse = fastattn.attention(query, key, value, mask=mask, return_lse=True)
    assert_same([out[:1], lse[:1]], [t[:1] for t in found])
    plain = reference.attention(query, key, value, mask=mask, return_lse=True)
    golden = reference.attention(*(t.double() for t in (query, key, value)), mask=mask, return_lse=True)
    for actual, of_plain, exact in zip((out, lse), plain, golden):
        finite = exact.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        assert_within_rule(actual[finite], of_plain[finite], exact[finite])


def test_calls_of_a_generation_step_run_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of keys, and none: one launch, without the layers above it."""
    for name in ("none", "of each sequence", "of each head"):
        tensors, options = heads(torch.float32, 1, KEYS, 2, 16), options_of(name, False)
        plan.clear()
        expected = [fastattn.attention(*tensors, **options) for _ in range(3)][-1]
        with monkeypatch.context() as patch:
            patch.setattr(torch_backend, "attention_fwd", None)
            assert torch.equal(fastattn.attention(*tensors, **options), expected)


@pytest.mark.parametrize("seed", [1.5, "a", True])
def test_a_seed_that_is_no_integer_is_refused_by_a_plan_too(seed: object) -> None:
    tensors, mask = heads(torch.float32, 1, KEYS), MASKS["of each sequence"]
    for _ in range(3):
        fastattn.attention(*tensors, mask=mask)
    with pytest.raises(TypeError, match="dropout_seed"):
        fastattn.attention(*tensors, mask=mask, dropout_seed=seed)
