"""The choice of a backend: explained in words, as a table and as plain types; a missed fused path warns once."""

from __future__ import annotations

import dataclasses
import io
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import fastattn
from fastattn import backends, spec, torch_compat
from fastattn.backends import switches
from fastattn.backends.torch.dense import fused_bwd_min_keys
from fastattn.backends.torch.whole_rows import ELEMENTS
from fastattn.integrations import flash_attn
from fastattn.ops import plan

FUSED = [backend for backend in backends.BACKENDS if backend.NAME != "torch"]


def qkv(grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, 4, 5, 8, requires_grad=grad) for _ in range(3)]


ENDS = torch.tensor([0, 3, 8], dtype=torch.int32)


def drawn(explanation: backends.Explanation, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=60, **options)
    console.print(explanation)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def explanation() -> backends.Explanation:
    return fastattn.explain(*qkv(grad=True), causal=True, softcap=2.0)


def test_in_words(explanation: backends.Explanation) -> None:
    first, second, third, *rest = str(explanation).splitlines()
    assert first == f"backend: torch ({explanation.tiles})"
    assert second == f"backward: torch ({explanation.backward_tiles})"
    assert third == "plan: planned"
    assert rest == [f"not {name}: {reason}" for name, reason in explanation.refusals]
    assert len(rest) == len(FUSED)
    assert "blockwise" in first


def test_as_a_table_in_a_terminal_and_without_escapes_elsewhere(explanation: backends.Explanation) -> None:
    plain, colourful = drawn(explanation), drawn(explanation, force_terminal=True)
    assert "\x1b[" in colourful
    assert "\x1b" not in plain
    said = " ".join(plain.split())
    assert "backend tiles, or why not" in said
    for name, detail in (*explanation.refusals, ("torch", str(explanation.tiles))):
        assert any(f" {name} " in line for line in plain.splitlines())
        assert all(word in said for word in detail.split())


def test_as_plain_types(explanation: backends.Explanation) -> None:
    as_dict = json.loads(json.dumps(explanation.to_dict()))
    assert as_dict.keys() == {field.name for field in dataclasses.fields(explanation)}
    assert as_dict["backend"] == as_dict["backward"] == "torch"
    assert as_dict["refusals"] == dict(explanation.refusals)
    assert as_dict["spec"]["causal"] == "bottom_right"
    assert as_dict["spec"]["dtype"] == "torch.float32"
    assert as_dict["spec"]["softcap"] is True


def test_a_backward_that_runs_elsewhere_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = FUSED[-1]
    monkeypatch.setattr(fused, "why_not", lambda spec: "no backward" if spec.backward else None)
    monkeypatch.setattr(fused, "why_not_auto", lambda spec: None)
    monkeypatch.setattr(fused, "tiles", lambda spec: "64x64")
    explanation = fastattn.explain(*qkv(grad=True))
    assert (explanation.backend, explanation.tiles, explanation.backward) == (fused.NAME, "64x64", "torch")
    assert f"backward not {fused.NAME}: no backward" in str(explanation)
    assert "no backward" in drawn(explanation)
    assert fastattn.explain(*qkv()).backward is None


IDS = torch.zeros(2, 5, dtype=torch.int32)
ROWS, FUSED_CPU, BLOCKS = (
    "softmax of whole rows in torch operations",
    "torch's fused CPU kernel",
    "blockwise softmax",
)
FEW = {
    dtype: f"{ROWS} up to {fused_bwd_min_keys(dtype) - 1} keys and {ELEMENTS // 2} weights of a key head"
    for dtype in (torch.bfloat16, torch.float16)
}
ON_CPU: dict[str, tuple[dict[str, Any], torch.dtype, str, str]] = {
    "plain": ({}, torch.float32, FUSED_CPU, FUSED_CPU),
    "16 bits": ({}, torch.bfloat16, FUSED_CPU, f"{FEW[torch.bfloat16]}, beyond {FUSED_CPU}"),
    "dropout": ({"dropout_p": 0.1}, torch.float32, f"{ROWS} up to {ELEMENTS // 2} weights", ROWS),
    "segments": ({"segment_ids": IDS}, torch.float32, FUSED_CPU, FUSED_CPU),
    "segments in 16 bits": ({"segment_ids": IDS}, torch.float16, FUSED_CPU, FEW[torch.float16]),
    "segments, dropout": (
        {"segment_ids": IDS, "dropout_p": 0.1}, torch.float32,
        f"{ROWS} up to {ELEMENTS} weights of all heads in a run of a segment, beyond {BLOCKS}",
        ROWS,
    ),
    "softcap": ({"softcap": 3.0}, torch.bfloat16, BLOCKS, BLOCKS),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_CPU)
def test_what_runs_on_a_cpu_is_said(name: str) -> None:
    options, dtype, forward, backward = ON_CPU[name]
    q, k, v = (t.to(dtype).requires_grad_() for t in qkv())
    explanation = fastattn.explain(q, k, v, **options)
    assert explanation.tiles is not None
    assert explanation.tiles.startswith(forward)
    assert explanation.backward_tiles is not None
    assert explanation.backward_tiles.startswith(backward)


ONE, SEVERAL = "one query: ", "matrix products with all keys up to 16 queries"
KERNEL = "torch's fused CPU kernel"
FEW_KEYS = f"{KERNEL} with one thread up to {2**17 // 8} keys of all key heads, beyond matrix products"
# (queries, key heads, dtype, threads, whether the processor is of MKL's maker, the start of what `explain`, and of a
# cache `explain_kv_cache`, says)
OF_ONE_QUERY = [
    (1, 2, torch.float32, 2, False, f"{ONE}matrix products"),
    (1, 2, torch.float32, 1, False, f"{ONE}{KERNEL}"),
    (1, 4, torch.bfloat16, 1, False, f"{ONE}{FEW_KEYS}"),
    (1, 4, torch.float32, 2, True, f"{ONE}matrix products"),
    (1, 2, torch.float32, 2, True, f"{ONE}{KERNEL}"),
    (1, 4, torch.bfloat16, 2, True, f"{ONE}{KERNEL}"),
    (5, 4, torch.float32, 1, False, SEVERAL),
    (5, 4, torch.float32, 2, True, SEVERAL),
]


@pytest.mark.parametrize(("queries", "kv_heads", "dtype", "threads", "intel", "said"), OF_ONE_QUERY)
def test_what_runs_one_query_is_said(
    queries: int, kv_heads: int, dtype: torch.dtype, threads: int, intel: bool, said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch_compat, "has_mkl_on_intel", lambda: intel)
    monkeypatch.setattr(torch_compat, "has_fast_products", lambda dtype: intel)
    plan.clear()
    q, cache = torch.randn(2, 4, queries, 8).to(dtype), torch.zeros(2, kv_heads, 9, 8, dtype=dtype)
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    assert (fastattn.explain_kv_cache(q, cache, cache.clone(), lengths).tiles or "").startswith(said)
    if queries == 1:
        kernel = "cpu_flash_attention"
        called: list[int] = []
        real = getattr(torch_compat, kernel)
        monkeypatch.setattr(torch_compat, kernel, lambda *args: called.append(1) or real(*args))
        fastattn.attention_kv_cache(q, cache, cache.clone(), lengths)
        assert bool(called) == (KERNEL in said)
        assert (fastattn.explain(q, cache, cache).tiles or "").startswith(said)
    plan.clear()


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, "each sequence by itself: torch's fused", "sequences of up to 32 keys and "),
        (
            {"dropout_p": 0.1},
            f"sequences of up to {ELEMENTS} weights",
            f"sequences of up to {ELEMENTS} weights",
        ),
        ({"softcap": 2.0}, "each sequence by itself: blockwise", "each sequence by itself: blockwise"),
    ],
    ids=str,
)
def test_what_runs_packed_sequences_is_said(options: dict[str, Any], forward: str, backward: str) -> None:
    packed = [t.flatten(0, 1) for t in qkv(grad=True)]
    explanation = fastattn.explain_varlen(*packed, ENDS, ENDS, **options)
    assert (explanation.tiles or "").startswith(forward)
    assert (explanation.backward_tiles or "").startswith(backward)


def test_the_other_ops_are_explained_too() -> None:
    q, k, v = qkv(grad=True)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    state = torch.get_rng_state()
    explanation = fastattn.explain_varlen(*packed, ENDS, ENDS, causal=True, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert explanation.backend == explanation.backward == "torch"
    assert explanation.spec.features() == ("dropout",)
    cache, lengths = torch.zeros(2, 4, 9, 8), torch.tensor([3, 4], dtype=torch.int32)
    with torch.no_grad():
        explanation = fastattn.explain_kv_cache(
            q, cache, cache.clone(), lengths, key=k, value=v, window=(3, 0)
        )
    assert explanation.backend == "torch"
    assert explanation.spec.window_left
    assert not cache.any()
    assert fastattn.explain_softmax(q, causal=True).backend == "torch"
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        fastattn.explain_varlen(*packed, ENDS + 1, ENDS)
    with pytest.raises(ValueError, match="cache_lengths"), torch.no_grad():
        fastattn.explain_kv_cache(q, cache, cache, lengths + 9)


def into_a_cache(q: Tensor, k: Tensor, v: Tensor) -> Any:
    cache = torch.zeros(2, 4, 9, 8)
    with torch.no_grad():
        return fastattn.attention_kv_cache(q, cache, cache.clone(), torch.tensor([3, 4], dtype=torch.int32))


def by_module(q: Tensor, k: Tensor, v: Tensor) -> Any:
    x = q[0]
    return fastattn.MultiHeadAttention(8, 2, batch_first=True)(x, x, x)


def by_torchs_name(q: Tensor, k: Tensor, v: Tensor) -> Any:
    with fastattn.sdpa_override():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def by_swap(q: Tensor, k: Tensor, v: Tensor) -> Any:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    fastattn.swap_attention(layer)
    return layer(q[0])


def by_transformers(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from fastattn.integrations.transformers import attention_forward

    return attention_forward(torch.nn.Module(), q, k, v, None)


def packed(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return fastattn.attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), ENDS, ENDS)


ENTRY_POINTS: dict[str, Callable[..., Any]] = {
    "attention": fastattn.attention,
    "weights": lambda q, k, v: fastattn.attention(q, k, v, return_weights=True),
    "varlen": packed,
    "kv_cache": into_a_cache,
    "softmax": lambda q, k, v: fastattn.softmax(q),
    "cross_entropy": lambda q, k, v: fastattn.cross_entropy(q[0, 0], torch.arange(5)),
    "sdpa": fastattn.scaled_dot_product_attention,
    "sdpa_override": by_torchs_name,
    "flash-attn": flash_attn.flash_attn_func,
    "MultiHeadAttention": by_module,
    "swap_attention": by_swap,
    "transformers": by_transformers,
}


@pytest.fixture
def on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specs say that calls run on a GPU that no fused kernel is made for."""
    for kind in (spec.AttentionSpec, spec.SoftmaxSpec):
        of = kind.of
        monkeypatch.setattr(
            kind, "of", staticmethod(lambda *a, of=of, **k: of(*a, **k).replace(device="cuda", arch=70))
        )


@pytest.mark.usefixtures("on_an_old_gpu")
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_no_fused_kernel_is_said_once_at_every_entry_point(entry: str) -> None:
    if entry == "transformers" and find_spec("transformers") is None:
        pytest.skip("needs transformers")
    with pytest.warns(RuntimeWarning, match=r"without a fused kernel, on backend='torch'") as said:
        ENTRY_POINTS[entry](*qkv())
    messages = [str(warning.message) for warning in said]
    assert len(messages) == len(set(messages))
    assert all(all(f"{backend.NAME}: " in message for backend in FUSED) for message in messages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ENTRY_POINTS[entry](*qkv())


@pytest.mark.usefixtures("on_an_old_gpu")
def test_a_backward_off_the_fused_path_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = qkv(grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = fastattn.attention(*operands)
    backends._warned.clear()
    with pytest.warns(RuntimeWarning, match="without a fused kernel"):
        out.sum().backward()


@pytest.mark.usefixtures("on_an_old_gpu")
def test_a_backend_that_was_asked_for_by_name_is_no_surprise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*qkv(), backend="torch")


def test_the_warning_points_at_the_line_that_called() -> None:
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="materialises") as said:
        torch.vmap(lambda q: fastattn.attention(q, k, v))(q[None])
    assert [warning.filename for warning in said] == [__file__]


def test_the_parts_that_can_be_switched_off_are_what_backends_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert switches.BACKENDS == backends.NAMES
    ops = {name for backend in backends.BACKENDS for name in vars(backend) if name.endswith(("_fwd", "_bwd"))}
    assert ops <= set(switches.PARTS)


def test_a_part_switched_off_is_refused_by_name_and_passed_over_by_auto(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = torch.randn(1, 1, 8, 16, requires_grad=True)
    monkeypatch.setenv("FASTATTN_DISABLE", " torch.attention_bwd ,cuda.one_pass")
    with pytest.raises(
        RuntimeError, match=r"cannot run this call: FASTATTN_DISABLE switches torch.attention_bwd off"
    ):
        fastattn.attention(query, query, query, backend="torch")
    fastattn.attention(query.detach(), query.detach(), query.detach(), backend="torch")
    assert backends.switched_off("cuda", "one_pass") == "FASTATTN_DISABLE switches cuda.one_pass off"
    assert backends.switched_off("cuda", "attention_fwd") is None
    monkeypatch.setenv("FASTATTN_DISABLE", "torch")
    with pytest.raises(RuntimeError, match=r"no backend can run this call.*switches torch off"):
        fastattn.attention(query, query, query)
    assert ("torch", "FASTATTN_DISABLE switches torch off") in backends.available()


@pytest.mark.parametrize("text", ["cudnn", "cuda.backward", "cuda.", "cuda;triton"])
def test_a_switch_that_names_nothing_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_DISABLE", text)
    query = torch.randn(1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"FASTATTN_DISABLE=.*needs a backend of cuda, triton, torch"):
        fastattn.attention(query, query, query)
