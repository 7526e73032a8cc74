"""Packed sequences on the Triton backend: the error rule for every feature, and what packing must not change."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, UNEVEN_TILES, Maker, Options
from attention_cases import Inputs as PaddedInputs
from attention_cases import run_triton as run_padded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_cases import RAGGED, Case, Inputs, check, gradients, run_reference, run_triton

import fastattn
from fastattn.backends import torch as torch_backend
from fastattn.backends import triton as triton_backend
from fastattn.kernels.arguments import Launch
from fastattn.kernels.sequences import SEARCH
from fastattn.spec import AttentionSpec, VarlenCall
from numerics import assert_within_rule, plain_in_any_order

NAN = float("nan")
EXAMPLES = int(os.environ.get("FASTATTN_TEST_EXAMPLES", "0"))
EVEN = ((37, 37), (16, 16), (50, 50))
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "samples": 4, "lengths": RAGGED[:3]}


def everything(make: Maker) -> Options:
    return {
        "causal": True, "window": (30, None), "softcap": 3.0, "alibi_slopes": make.normal(len(RAGGED), 2).abs(),
        "sinks": make.normal(2), "dropout_p": 0.2, "dropout_seed": -99, "scale": 0.4,
    }  # fmt: skip


CASES = [
    Case("plain", heads=2, kv_heads=2),
    Case("plain, bfloat16", dtype=torch.bfloat16),
    Case("plain, float32", **FLOAT32),
    Case("whole tiles only", lengths=((32, 48), (16, 16)), rest=(0, 0)),
    Case("uneven tiles", {"causal": True}, lengths=((70, 83), (3, 40), (64, 64)), tiles=UNEVEN_TILES),
    Case("causal", {"causal": True}),
    Case("causal, even", {"causal": True}, lengths=EVEN, heads=2, kv_heads=2, dtype=torch.bfloat16),
    Case("causal, more queries than keys", {"causal": True}, lengths=((53, 20), (20, 53), (40, 1))),
    Case("causal, top left", {"causal": "top_left"}, lengths=((53, 20), (20, 53), (40, 1))),
    Case("causal, float32", {"causal": True}, **FLOAT32),
    Case("window", {"window": (9, 4)}),
    Case("window left", {"window": (12, None)}, lengths=EVEN),
    Case("window right", {"window": (None, 7)}),
    Case("window, causal, top left", {"window": (17, 3), "causal": "top_left"}),
    Case("window wider than everything", {"window": (10**9, 10**9)}),
    Case("grouped heads", {"causal": True}, heads=4, kv_heads=2, lengths=RAGGED[:3]),
    Case("one key head", {"window": (20, None)}, heads=3, lengths=RAGGED[:3]),
    Case("slopes", lambda make: {"alibi_slopes": make.normal(2).abs()}, heads=2, kv_heads=2),
    Case(
        "slopes per sequence, causal",
        lambda make: {"alibi_slopes": make.normal(len(RAGGED), 2).abs(), "causal": True},
        heads=2,
    ),
    Case(
        "slopes, top left, float32",
        lambda make: {"alibi_slopes": make.normal(3, 1).abs(), "causal": "top_left"},
        **FLOAT32,
    ),
    Case("softcap", {"softcap": 1.5, "causal": True}),
    Case("softcap, float32", {"softcap": 1.5}, **FLOAT32),
    Case("sinks", lambda make: {"sinks": make.normal(2), "causal": True}, heads=2),
    Case("sinks, float32", lambda make: {"sinks": make.normal(2), "window": (9, 0)}, heads=2, **FLOAT32),
    Case("dropout", {"dropout_p": 0.3, "dropout_seed": 1234567890123}, heads=2),
    Case("dropout, causal, float32", {"dropout_p": 0.1, "dropout_seed": 5, "causal": True}, **FLOAT32),
    Case("scale", {"scale": 1.7}),
    Case("negative scale", {"scale": -0.4, "causal": True}),
    Case("head dim 1", head_dim=1, value_dim=1),
    Case("odd head dims", {"causal": True}, head_dim=59, value_dim=37),
    Case("value dim larger", head_dim=24, value_dim=80, lengths=RAGGED[:3]),
    Case("head dim 256", {"causal": True}, head_dim=256, value_dim=256, lengths=RAGGED[:3]),
    Case("everything", everything, heads=2, value_dim=24),
    Case("no queries", lengths=((0, 5), (0, 9)), rest=(0, 0)),
    Case("no keys", lengths=((20, 0), (3, 0)), rest=(0, 0)),
    Case("no keys but sinks", lambda make: {"sinks": make.normal(1)}, lengths=((20, 0), (3, 0))),
    Case("only tokens of no sequence", everything, lengths=((0, 0),) * len(RAGGED), rest=(20, 20), heads=2),
    Case("no sequence", lambda make: {"sinks": make.normal(1)}, lengths=(), rest=(20, 20)),
    Case("nothing", lengths=(), rest=(0, 0)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case) -> None:
    check(case)


BOUND = st.none() | st.integers(0, 40)  # a side of a window
CALLS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.tuples(st.integers(0, 36), st.integers(0, 36)), min_size=1, max_size=3),
        "rest": st.tuples(st.integers(0, 20), st.integers(0, 20)),
        "kv_heads": st.just(1),
        "group": st.integers(1, 2),
        "head_dim": st.sampled_from([3, 16, 24]),
        "value_dim": st.sampled_from([5, 16, 24]),
        "tiles": st.sampled_from([SMALL_TILES, UNEVEN_TILES]),
        "causal": st.sampled_from([False, True, "top_left"]),
        "window": st.none() | st.tuples(BOUND, BOUND),
        "softcap": st.sampled_from([None, 2.0]),
        "dropout_p": st.sampled_from([0.0, 0.3]),
        "slopes": st.sampled_from([None, "shared", "own"]),
        "sinks": st.booleans(),
    }
)


@settings(
    max_examples=EXAMPLES or 8,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(CALLS)
def test_error_rule_of_combinations(drawn: dict[str, Any]) -> None:
    """Eight fixed combinations of options and lengths, or FASTATTN_TEST_EXAMPLES=N fresh ones."""
    heads = drawn["kv_heads"] * drawn["group"]

    def options(make: Maker) -> Options:
        chosen = {name: drawn[name] for name in ("causal", "window", "softcap", "dropout_p")}
        if drawn["slopes"]:
            shape = (heads,) if drawn["slopes"] == "shared" else (len(drawn["lengths"]), heads)
            chosen["alibi_slopes"] = make.normal(*shape).abs()
        if drawn["sinks"]:
            chosen["sinks"] = make.normal(heads)
        return chosen | {"dropout_seed": 17}

    sizes = {name: drawn[name] for name in ("rest", "kv_heads", "head_dim", "value_dim", "tiles")}
    check(Case("drawn", options, lengths=tuple(drawn["lengths"]), heads=heads, **sizes))


def test_more_sequences_than_are_searched_at_once() -> None:
    lengths = tuple((b % 3 == 0, b % 5 == 0) for b in range(SEARCH.value + 20))
    inputs = Inputs.of(Case("many", lengths=lengths))
    spec = AttentionSpec.of(inputs.call().as_one_sequence())
    out, _ = triton_backend.varlen_fwd(spec, inputs.call(), SMALL_TILES)
    assert_within_rule(
        out, *(run_reference(inputs, dtype)["out"] for dtype in (torch.float16, torch.float64))
    )


BITWISE = {
    "causal": {"causal": True},
    "window, top left": {"window": (20, 5), "causal": "top_left"},
    "slopes and sinks": lambda make: {
        "alibi_slopes": make.normal(len(RAGGED), 2).abs(), "sinks": make.normal(2), "causal": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BITWISE)
def test_a_sequence_gives_the_same_bits_alone_and_by_the_padded_call(name: str) -> None:
    together = Inputs.of(Case(name, BITWISE[name], heads=2))
    expected = run_triton(together, SMALL_TILES)
    for b in (0, 2, 3):
        keys = RAGGED[b][1]
        one = together.alone(b)
        alone = run_triton(one, SMALL_TILES)
        as_padded = (t.transpose(0, 1)[None] for t in (one.query, one.key, one.value))
        dout = one.dout.transpose(0, 1)[None]
        padded = run_padded(PaddedInputs(*as_padded, one.options, dout, one.dlse[None]), SMALL_TILES)
        for result, where in (("out", together.rows(b)), ("dquery", together.rows(b)), ("dkey", together.cols(b)),
                              ("dvalue", together.cols(b))):  # fmt: skip
            assert torch.equal(alone[result], expected[result][where]), result
            if keys:
                assert torch.equal(padded[result][0].transpose(0, 1), expected[result][where]), result
        assert torch.equal(alone["lse"], expected["lse"][:, together.rows(b)])
        assert torch.equal(padded["lse"][0], expected["lse"][:, together.rows(b)])
        if "dalibi_slopes" in expected:
            assert torch.equal(alone["dalibi_slopes"][0], expected["dalibi_slopes"][b])
            torch.testing.assert_close(padded["dalibi_slopes"][0], expected["dalibi_slopes"][b])


def test_dropout_counts_sequences_and_local_positions() -> None:
    """The padded call of equal lengths draws the same masks: b is the sequence, i and j are its own."""
    options = {"dropout_p": 0.4, "dropout_seed": 3}
    packed = Inputs.of(Case("dropout", options, lengths=((20, 17),) * 2, rest=(0, 0), heads=2))
    tensors = (t.unflatten(0, (2, -1)).transpose(1, 2) for t in (packed.query, packed.key, packed.value))
    dout = packed.dout.unflatten(0, (2, -1)).transpose(1, 2)
    dlse = packed.dlse.unflatten(1, (2, -1)).transpose(0, 1)
    padded = run_padded(PaddedInputs(*tensors, options, dout, dlse), SMALL_TILES)
    for name, tensor in run_triton(packed, SMALL_TILES).items():
        if name != "lse":
            assert torch.equal(tensor, padded[name].transpose(1, 2).flatten(0, 1)), name


def test_repeats_bitwise() -> None:
    inputs = Inputs.of(Case("repeat", BITWISE["slopes and sinks"], heads=2))
    first, second = run_triton(inputs, SMALL_TILES), run_triton(inputs, SMALL_TILES)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_nothing_leaks_from_neighbours(options: Options) -> None:
    """Another sequence, and tokens of none, may be NaN in everything."""
    inputs = Inputs.of(Case("poison", options))
    expected = run_triton(inputs, SMALL_TILES)
    poisoned = (0, 4)
    for name in ("query", "key", "value", "dout"):
        tensor = getattr(inputs, name).clone()
        ranges = inputs.rows if name in ("query", "dout") else inputs.cols
        for b in poisoned:
            tensor[ranges(b)] = NAN
        tensor[ranges(len(RAGGED) - 1).stop :] = NAN
        setattr(inputs, name, tensor)
    inputs.dlse[:, inputs.rows(len(RAGGED) - 1).stop :] = NAN
    actual = run_triton(inputs, SMALL_TILES)
    for name in ("out", "dquery", "dkey", "dvalue"):
        ranges = inputs.cols if name in ("dkey", "dvalue") else inputs.rows
        for b in set(range(len(RAGGED))) - set(poisoned):
            assert torch.equal(actual[name][ranges(b)], expected[name][ranges(b)]), (name, b)
        assert (actual[name][ranges(len(RAGGED) - 1).stop :] == 0).all(), name
    assert (actual["lse"][:, inputs.rows(len(RAGGED) - 1).stop :] == -math.inf).all()


def test_slopes_of_a_sequence_know_nothing_of_its_neighbours() -> None:
    options = {"alibi_slopes": torch.ones(len(RAGGED), 1, device=DEVICE)}
    inputs = Inputs.of(Case("poison", options))
    expected = run_triton(inputs, SMALL_TILES)["dalibi_slopes"]
    inputs.value[inputs.cols(0)] = NAN
    actual = run_triton(inputs, SMALL_TILES)["dalibi_slopes"]
    assert actual[0].isnan().all()
    assert torch.equal(actual[1:], expected[1:])


@pytest.mark.parametrize("forward", ["triton", "torch"])
def test_forward_of_one_backward_of_the_other(forward: str) -> None:
    inputs = Inputs.of(Case("crossing", everything, heads=2))
    call, needs = inputs.call(), inputs.needs()
    spec = AttentionSpec.of(call.as_one_sequence(), needs)
    upstream_grads = (inputs.dout, inputs.dlse, needs)
    if forward == "triton":
        residuals = triton_backend.varlen_fwd(spec, call, SMALL_TILES)
        grads = torch_backend.varlen_bwd(spec, call, *residuals, *upstream_grads)
    else:
        residuals = torch_backend.varlen_fwd(spec, call)
        grads = triton_backend.varlen_bwd(spec, call, *residuals, *upstream_grads, SMALL_TILES)
    golden, plain = run_reference(inputs, torch.float64), run_reference(inputs, torch.float16)
    for name, actual in gradients(inputs, grads).items():
        assert_within_rule(actual, plain[name], golden[name], name, torch.float16)


LAYOUTS = {
    "heads before tokens": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "rows apart": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "columns apart": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    inputs = Inputs.of(Case("strides", {"causal": True}, lengths=((20, 20), (5, 9)), heads=2, kv_heads=2))
    expected = run_triton(inputs, SMALL_TILES)
    for name in ("query", "key", "value", "dout"):
        setattr(inputs, name, LAYOUTS[layout](getattr(inputs, name)))
    actual = run_triton(inputs, SMALL_TILES)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_output_has_the_memory_order_of_the_query() -> None:
    inputs = Inputs.of(Case("order", lengths=((5, 5),), heads=2))
    assert run_triton(inputs, SMALL_TILES)["out"].is_contiguous()
    inputs.query = LAYOUTS["heads before tokens"](inputs.query)
    assert run_triton(inputs, SMALL_TILES)["out"].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """Strides that put the last token or head past 2**31 elements; only the pages in use are ever touched."""
    lengths = ((9, 9), (20, 20))
    inputs = Inputs.of(Case("far", {"causal": True}, lengths=lengths, rest=(0, 0), heads=2, kv_heads=2))
    expected = run_triton(inputs, SMALL_TILES)
    span = 2**31 + 2**20
    strides = (span // 29, 64, 1) if far == "tokens" else (64, 2**31, 1)
    storage = torch.empty(span, dtype=torch.float16, device=DEVICE)
    for index, name in enumerate(("query", "key", "value", "dout")):
        near = getattr(inputs, name)
        view = storage.as_strided(near.shape, strides, storage_offset=16 * index)
        view.copy_(near)
        setattr(inputs, name, view)
    actual = run_triton(inputs, SMALL_TILES)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


class DeviceReads(TorchDispatchMode):
    """Within it, a list of the operations that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in (
            "aten::_local_scalar_dense",
            "aten::_to_copy",
            "aten::nonzero",
            "aten::equal",
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bound", [None, 40])
def test_no_length_leaves_the_device(bound: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is launched nor where depends on lengths, whether max_seqlen is given or not."""
    inputs = Inputs.of(Case("synchronisation", everything, heads=2))
    call = VarlenCall(**{
        **{name: getattr(inputs.call(), name) for name in VarlenCall.__dataclass_fields__},
        "max_seqlen_q": -1 if bound is None else bound, "max_seqlen_k": -1 if bound is None else bound,
    })  # fmt: skip
    grids: dict[tuple[int, ...], list[tuple[int]]] = {}
    for cu_seqlens in ((0, 21, 21, 38, 43, 44), (0, 1, 2, 3, 4, 47)):
        for kept in (call.cu_seqlens_q, call.cu_seqlens_k):
            kept.copy_(torch.tensor(cu_seqlens, dtype=torch.int32))
        monkeypatch.setattr(
            Launch, "run", lambda launch, e=cu_seqlens: grids.setdefault(e, []).append(launch.grid)
        )
        with DeviceReads() as reads:
            spec = AttentionSpec.of(call.as_one_sequence(), inputs.needs())
            out, lse = triton_backend.varlen_fwd(spec, call)
            triton_backend.varlen_bwd(spec, call, out, lse, inputs.dout, inputs.dlse, inputs.needs())
        assert [name for name in reads.seen if "_to_copy" not in name] == []
    first, second = grids.values()
    assert first == second


def test_cu_seqlens_that_lie_touch_nothing_outside() -> None:
    """A GPU cannot check cu_seqlens without waiting for it, so whatever they hold, reads and writes stay inside."""
    inputs = Inputs.of(Case("lies", lengths=((20, 20), (20, 20)), rest=(0, 0)))
    call = inputs.call()
    spec = AttentionSpec.of(call.as_one_sequence())
    for cu_seqlens in ([0, 10**6, 40], [0, 50, 60], [-7, 20, 40], [0, 30, 10]):
        call.cu_seqlens_q.copy_(torch.tensor(cu_seqlens, dtype=torch.int32))
        call.cu_seqlens_k.copy_(torch.tensor(cu_seqlens, dtype=torch.int32))
        out, lse = triton_backend.varlen_fwd(spec, call, SMALL_TILES)
        triton_backend.varlen_bwd(spec, call, out, lse, inputs.dout, None, inputs.needs(), SMALL_TILES)


def test_the_public_call_and_its_gradients() -> None:
    """Through autograd with the tiles users get."""
    inputs = Inputs.of(Case("public", everything, heads=2, dtype=torch.float32))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}

    out, lse = fastattn.attention_varlen(
        inputs.query, inputs.key, inputs.value, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 33, 40, **inputs.options,
        return_lse=True, backend="triton",
    )  # fmt: skip
    seen = lse.isfinite()
    upstream = inputs.dout, inputs.dlse * seen
    actual = [out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), upstream)]
    golden = run_reference(inputs, torch.float64)
    plain = plain_in_any_order(partial(run_reference, inputs, torch.float32), golden)
    for value, name in zip(actual, ("out", "lse", *("d" + name for name in leaves)), strict=True):
        assert_within_rule(value, plain[name], golden[name], name)


def test_opcheck() -> None:
    """Schema, fake and autograd registration hold for what this backend returns."""
    inputs = Inputs.of(Case("opcheck", {"causal": True}, lengths=((5, 7), (0, 3)), rest=(1, 0)))
    call = inputs.call()
    args = [getattr(call, name) for name in VarlenCall.__dataclass_fields__]
    out, lse = torch.ops.fastattn.varlen_fwd(*args, "triton")
    needs = [True, True, True, False, False]
    opcheck(torch.ops.fastattn.varlen_bwd.default, (out, lse, out, lse, *args, needs, "triton"))
    for tensor in args[:3]:
        tensor.requires_grad_()
    opcheck(torch.ops.fastattn.varlen_fwd.default, (*args, "triton"))


def test_compiles_without_breaks() -> None:
    inputs = Inputs.of(Case("compiled", {"causal": True}, lengths=((5, 5), (9, 9)), rest=(0, 0)))

    def attend(query: Tensor) -> Tensor:
        return fastattn.attention_varlen(
            query, inputs.key, inputs.value, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 9, 9, causal=True,
            backend="triton",
        )  # fmt: skip

    query = inputs.query.requires_grad_()
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(query)
    (grad,) = torch.autograd.grad(out, query, inputs.dout)
    expected = attend(query)
    assert torch.equal(out, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, query, inputs.dout)[0])
