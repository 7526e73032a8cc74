"""Programs made from models on fastattn run without it: the same results from torch's own operations."""

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from export_cases import (
    EXPORTED,
    HKV,
    SDPA,
    B,
    Calls,
    D,
    assert_as_exact,
    encoder,
    foreign,
    padded,
    qkv,
    randn,
    targets,
)
from torch import Tensor, nn

import fastattn
from fastattn.integrations.export import decompositions, plain_torch
from fastattn.models import GPT, GPTConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_call_holds_torchs_operations_only(name: str) -> None:
    call, by_torch = EXPORTED[name]
    lengths = ({2: torch.export.Dim("length")},) * 3
    program = torch.export.export(Calls(call), tuple(qkv(same=True)), dynamic_shapes=(lengths,))
    assert foreign(program.graph) == []
    assert (SDPA in targets(program.graph)) == by_torch
    for more in (0, 4):
        operands = qkv(same=True, more=more)
        torch.testing.assert_close(program.module(check_guards=False)(*operands), call(*operands))


@pytest.mark.parametrize("name", EXPORTED)
def test_a_traced_call_holds_torchs_operations_only(name: str) -> None:
    call, _ = EXPORTED[name]
    with warnings.catch_warnings():
        # what is decided on sizes outside of attention itself is the same for any
        warnings.simplefilter("ignore" if name in ("sdpa", "losses") else "error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "torch.tensor results are registered as constants")
        trace = torch.jit.trace(call, tuple(qkv(same=True)), check_trace=False)
    assert "fastattn::" not in str(trace.graph)
    batch = B if name in ("varlen", "lengths", "cache") else B + 1
    for operands in (qkv(same=True), qkv(same=True, more=4, batch=batch)):
        torch.testing.assert_close(trace(*operands), call(*operands))


def test_what_a_trace_knows_of_lengths_is_not_fixed() -> None:
    """Equal lengths while it is traced, different ones later."""
    trace = torch.jit.trace(EXPORTED["causal"][0], tuple(qkv(same=True)), check_trace=False)
    torch.testing.assert_close(trace(*qkv()), fastattn.attention(*qkv(), causal=True))


def test_dropout_is_torchs_where_no_seed_is_given() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5)

    program = torch.export.export(Calls(call), tuple(qkv())).module()
    assert foreign(program.graph) == []
    first, second = program(*qkv()), program(*qkv())
    assert not torch.equal(first, second)
    mean = torch.stack([program(*qkv()) for _ in range(400)]).mean(0)
    spread = torch.stack([program(*qkv()) for _ in range(400)]).std(0)
    assert ((mean - fastattn.attention(*qkv())).abs() < 6 * spread / 400**0.5 + 1e-9).all()


def test_strict_export() -> None:
    program = torch.export.export(Calls(EXPORTED["causal"][0]), tuple(qkv()), strict=True)
    assert foreign(program.run_decompositions(decompositions()).graph) == []
    torch.testing.assert_close(
        program.module(check_guards=False)(*qkv()), fastattn.attention(*qkv(), causal=True)
    )


@pytest.mark.parametrize("name", [name for name in EXPORTED if name not in ("losses", "cache")])
def test_fused_ops_stay_where_asked_for_and_decompose(name: str) -> None:
    call, _ = EXPORTED[name]
    with torch.no_grad(), plain_torch(False):
        program = torch.export.export(Calls(call), tuple(qkv(same=True)))
    assert foreign(program.graph)
    if name != "softmax":
        table = torch.export.default_decompositions()
        table.pop(SDPA, None)
        program = program.run_decompositions({**table, **decompositions()})
    else:
        program = program.run_decompositions(decompositions())
    assert foreign(program.graph) == []
    torch.testing.assert_close(program.module(check_guards=False)(*qkv(same=True)), call(*qkv(same=True)))


def test_a_cache_decomposes() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        lengths = torch.tensor([4, 2]).int()
        return fastattn.attention_kv_cache(q, k, v, lengths, key=new, value=new)

    operands = [*qkv(), randn(B, HKV, 2, D)]
    with torch.no_grad(), plain_torch(False):
        program = torch.export.export(Calls(call), tuple(operands))
    assert foreign(program.graph)
    plain = torch.export.export(Calls(call), tuple(operands))
    assert foreign(plain.graph) == []
    expected = [t.clone() for t in operands]
    out = call(*expected)
    torch.testing.assert_close(plain.module()(*operands), out)
    for actual, wanted in zip(operands, expected):
        torch.testing.assert_close(actual, wanted)


def test_a_swapped_encoder_exports_and_traces_for_any_batch_and_length() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length},) * 2
    program = torch.export.export(encoder(), padded(2, 7), dynamic_shapes=shapes)
    assert foreign(program.graph) == []
    assert targets(program.graph).count(SDPA) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        trace = torch.jit.trace(encoder(), padded(2, 7), check_trace=False)
    for sizes in ((2, 7), (4, 11)):
        assert_as_exact(program.module(check_guards=False)(*padded(*sizes)).detach(), *sizes)
        assert_as_exact(trace(*padded(*sizes)).detach(), *sizes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_recorded_gpt_heeds_padding_that_it_was_not_recorded_with(positions: str) -> None:
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=32, n_layer=2, n_head=4, positions=positions)
    model = Logits(GPT(config).eval())
    ids = torch.arange(14).view(2, 7) % 11
    padding = padded(2, 7)[1].flip(1)  # before the tokens, which look there
    trace = torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False)
    program = torch.export.export(model, (ids, torch.ones_like(ids)))
    assert "fastattn::" not in str(trace.inlined_graph)
    assert foreign(program.graph) == []
    for run in (trace, program.module()):
        torch.testing.assert_close(run(ids, ~padding), model(ids, ~padding))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, attention_mask=mask).logits[mask != 0]


LOADER = """
    import sys
    sys.modules["fastattn"] = None  # importing it fails
    import torch
    directory = sys.argv[1]
    x, padding = torch.load(f"{directory}/inputs.pt")
    with torch.no_grad():
        for kind in sys.argv[2:]:
            if kind == "export":
                run = torch.export.load(f"{directory}/export.pt2").module()
            elif kind == "trace":
                run = torch.jit.load(f"{directory}/trace.pt")
            else:
                run = torch._inductor.aoti_load_package(f"{directory}/aoti.pt2")
            torch.save(run(x, padding), f"{directory}/{kind}.out")
    assert not any(name.startswith("fastattn.") for name in sys.modules)
"""


def loaded_elsewhere(directory: Any, *kinds: str) -> None:
    """Run artefacts in a process that cannot import fastattn, at sizes they were not made at."""
    sizes = (3, 10)
    torch.save(padded(*sizes), directory / "inputs.pt")
    command = [sys.executable, "-c", textwrap.dedent(LOADER), str(directory), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        assert_as_exact(torch.load(directory / f"{kind}.out"), *sizes)


def exported() -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) * 2
    with torch.no_grad():
        return torch.export.export(encoder(), padded(2, 7), dynamic_shapes=shapes)


def test_saved_programs_and_traces_run_where_fastattn_is_not(tmp_path: Any) -> None:
    torch.export.save(exported(), tmp_path / "export.pt2")
    torch.jit.trace(encoder(), padded(2, 7), check_trace=False).save(tmp_path / "trace.pt")
    loaded_elsewhere(tmp_path, "export", "trace")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_aotinductor_package_runs_where_fastattn_is_not(tmp_path: Any) -> None:
    torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "aoti.pt2"))
    loaded_elsewhere(tmp_path, "aoti")
