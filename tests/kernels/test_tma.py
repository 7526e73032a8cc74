"""Operands loaded by TMA: the same bits, forward and backward, and only where descriptors can stand for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILES, UNEVEN_TILES, Case, Inputs, Maker, run_reference, run_triton
from varlen_cases import Case as PackedCase
from varlen_cases import Inputs as PackedInputs
from varlen_cases import run_triton as run_packed

from fastattn.backends import layout
from fastattn.backends import triton as backend
from fastattn.kernels import launches
from fastattn.kernels.launches import forward_launch
from fastattn.kernels.tiles import Tiles
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded
from numerics import assert_within_rule

NAN = float("nan")
REGISTERS = {"forward": 184, "dkdv": 216, "dq": 184}  # without TMA 235, 242 and 252
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
pytestmark = [
    pytest.mark.skipif(not HAS_TMA, reason="needs a GPU of compute capability 9.0, or none"),
    pytest.mark.newer_triton,
]


def everything(make: Maker) -> dict[str, object]:
    return {
        "causal": True, "window": (30, None), "bias": make.normal(4, 1, 37), "mask": make.normal(2, 1, 21, 37) < 1.0,
        "alibi_slopes": make.normal(4).abs(), "segment_ids": (make.integers(0, 2, 2, 21), make.integers(0, 2, 2, 37)),
        "sinks": make.normal(4), "softcap": 3.0, "dropout_p": 0.2, "dropout_seed": 99,
    }  # fmt: skip


CASES = [
    Case("plain", batch=2, heads=2, kv_heads=2),
    Case("causal, bfloat16", {"causal": True}, dtype=torch.bfloat16),
    Case("lengths", lambda make: {"key_lengths": torch.tensor([0, 29, 37], device=DEVICE)}, batch=3),
    Case("grouped heads, odd dims", {"window": (9, 4)}, heads=4, kv_heads=2, head_dim=24, value_dim=40),
    Case("head dim 128", {"causal": True}, head_dim=128, value_dim=128, tiles=UNEVEN_TILES),
    Case("everything", everything, batch=2, heads=4, kv_heads=2, head_dim=8, value_dim=16),
]


def with_tma(tiles: Tiles) -> Tiles:
    """The tiles with the switch on."""
    return replace(
        tiles, **{name: replace(getattr(tiles, name), tma=True) for name in ("forward", "dkdv", "dq")}
    )


def uses_tma(call: AttentionCall, **changes: object) -> bool:
    """Whether a launch would, with a tile that asks for it."""
    out = call.query.new_empty(*call.query.shape[:3], call.value.shape[3])
    lse = call.query.new_empty(call.query.shape[:3], dtype=torch.float32)
    spec = AttentionSpec.of(call).replace(**changes)
    return forward_launch(spec, call, out, lse, None, replace(SMALL_TILES.forward, tma=True)).arguments["TMA"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits(case: Case) -> None:
    inputs = Inputs.of(case)
    assert uses_tma(inputs.call())
    if "key_lengths" in inputs.options:
        for row, length in enumerate(inputs.options["key_lengths"].tolist()):
            inputs.key[row, :, length:] = NAN
            inputs.value[row, :, length:] = NAN
    expected = run_triton(inputs, case.tiles)
    for name, tensor in run_triton(inputs, with_tma(case.tiles)).items():
        assert torch.equal(tensor, expected[name]), name


def test_same_bits_from_any_memory_order() -> None:
    inputs = Inputs.of(Case("strides", {"causal": True}, batch=2, heads=2, kv_heads=2))
    for name in ("query", "key", "value", "dout"):
        tensor = getattr(inputs, name).transpose(1, 2).contiguous()
        setattr(inputs, name, torch.cat([tensor, tensor], dim=-1)[..., :16].transpose(1, 2))
    assert uses_tma(inputs.call())
    expected = run_triton(inputs, SMALL_TILES)
    for name, tensor in run_triton(inputs, with_tma(SMALL_TILES)).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_same_bits_of_packed_sequences_with_poisoned_neighbours(options: dict[str, object]) -> None:
    inputs = PackedInputs.of(PackedCase("packed", options, heads=2, kv_heads=2))
    expected = run_packed(inputs, SMALL_TILES)
    for name, tensor in run_packed(inputs, with_tma(SMALL_TILES)).items():
        assert torch.equal(tensor, expected[name]), name
    for name in ("query", "key", "value", "dout"):
        ranges = inputs.rows if name in ("query", "dout") else inputs.cols
        getattr(inputs, name)[ranges(2)] = NAN
    actual = run_packed(inputs, with_tma(SMALL_TILES))
    for name in ("out", "dquery", "dkey", "dvalue"):
        ranges = inputs.cols if name in ("dkey", "dvalue") else inputs.rows
        for b in (0, 1, 3, 4):
            assert torch.equal(actual[name][ranges(b)], expected[name][ranges(b)]), (name, b)


def test_only_where_descriptors_can_be_made() -> None:
    query = torch.empty(2, 2, 20, 16, dtype=torch.float16, device=DEVICE)
    call = AttentionCall(query, query, query)
    assert uses_tma(call)
    assert uses_tma(call, arch=90)
    assert uses_tma(call, arch=120)
    assert not uses_tma(call, arch=89)
    assert uses_tma(replace(call, key=query[:, :1, :1], value=query[:, :1, :1]))
    assert not uses_tma(replace(call, query=query[..., 1:9], key=query[..., :8]))  # not at 16 bytes
    assert not uses_tma(replace(call, key=query[:1, :1, :1].expand(2, 2, 20, 16)))  # broadcast
    assert not uses_tma(replace(call, key=query[:, :, :0], value=query[:, :, :0]))  # empty
    exact = query.float()
    assert not uses_tma(AttentionCall(exact, exact, exact))


def on_hopper(inputs: Inputs) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """(the results with the tiles a Hopper GPU gives the call, whether each attention kernel loaded by TMA)."""
    used = []
    call, needs = inputs.call(), GradsNeeded(query=True, key=True, value=True)
    original = launches.Launch.run

    def run(launch: launches.Launch) -> None:
        if "TMA" in launch.arguments:
            used.append(launch.arguments["TMA"])
        original(launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches.Launch, "run", run)
        out, lse = backend.attention_fwd(AttentionSpec.of(call).replace(arch=90), call)
        spec = AttentionSpec.of(call, needs).replace(arch=90)
        spec, *residuals = layout.upstream(backend, spec, out, lse, inputs.dout, inputs.dlse)
        grads = backend.attention_bwd(spec, call, *residuals, needs)
    results = {"out": out, "lse": lse, "dquery": grads.query, "dkey": grads.key, "dvalue": grads.value}
    return results, used


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("plain", [True, True, True]),
        ("unaligned", [False, False, False]),
        ("broadcast", [False, False, False]),
        ("broadcast dout", [True, False, False]),
    ],
)
def test_hopper_rows_by_what_tma_can_load(layout: str, expected: list[bool]) -> None:
    """The rows of the table, or those in their place, and right answers from both."""
    inputs = Inputs.of(
        Case(layout, {"causal": True}, seqlen_q=70, seqlen_k=70, heads=2, kv_heads=2, head_dim=64)
    )
    if layout == "unaligned":
        key = inputs.key
        inputs.key = torch.cat([key.flatten()[:1], key.flatten()])[1:].view(key.shape)
    if layout == "broadcast":
        inputs.value = inputs.value[:, :1].expand(inputs.value.shape)
    if layout == "broadcast dout":
        inputs.dout = inputs.dout[:, :, :1].expand(inputs.dout.shape)
    results, used = on_hopper(inputs)
    assert used == expected
    golden, plain = run_reference(inputs, torch.float64), run_reference(inputs, torch.float16)
    for name, tensor in results.items():
        assert_within_rule(tensor, plain[name], golden[name], f"{layout}: {name}", torch.float16)


def test_a_sequence_cut_out_of_a_batch_keeps_its_bits() -> None:
    """Whatever keeps TMA from a batch, such as a stride between its entries, keeps it from one entry as well."""
    case = Case(
        "batch", {"causal": True}, batch=2, seqlen_q=70, seqlen_k=70, heads=2, kv_heads=2, head_dim=64
    )
    inputs = Inputs.of(case)
    size = inputs.key[0].numel()
    apart = torch.empty(2 * size + 16, dtype=inputs.key.dtype).as_strided(
        inputs.key.shape, (size + 1, *inputs.key.stride()[1:])
    )
    inputs.key = apart.copy_(inputs.key)
    together, used = on_hopper(inputs)
    assert used == [False, False, False]
    for name in ("query", "key", "value", "dout", "dlse"):
        setattr(inputs, name, getattr(inputs, name)[:1])
    alone, used = on_hopper(inputs)
    assert used == [False, False, False]
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[name][:1]), name


@pytest.mark.exhaustive
def test_compiled_for_hopper() -> None:
    """TMA feeds wgmma, nothing spills, no operand is copied by threads, and few registers hold addresses."""
    script = Path(__file__).parent / "tma_compile.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    for name, report in json.loads(done.stdout).items():
        assert report["tma_copies"] > 0, name
        assert report["async_mma"] > 0, name
        assert report["local_ops"] == 0, name
        assert report["wide_copies"] == 0, name
        assert report["registers"] <= REGISTERS[name.split()[-1]], name
