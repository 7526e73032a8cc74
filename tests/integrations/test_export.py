"""Programs made from models on fastattn run without it: the same results from torch's own operations."""

import io
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.proxy import TraceError

import fastattn
from fastattn import reference
from fastattn.integrations.export import decompositions, plain_torch
from fastattn.models import GPT, GPTConfig
from numerics import assert_within_rule, plain_in_any_order

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

B, H, HKV, L, S, D = 2, 4, 2, 5, 7, 8
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chance(p: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < p


def qkv(
    dtype: torch.dtype = torch.float64, *, same: bool = False, batch: int = B, more: int = 0
) -> list[Tensor]:
    lengths = (S + more, S + more, S + more) if same else (L + more, S + more, S + more)
    return [
        randn(batch, heads, n, D, seed=i, dtype=dtype)
        for i, (heads, n) in enumerate(zip((H, HKV, HKV), lengths))
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (1, 0)},
    "top left in a window": {"causal": "top_left", "window": (2, 2)},
    "mask": {"mask": chance(0.3, B, 1, L, S)},
    "mask by key": {"mask": chance(0.5, B, 1, 1, S), "causal": True},
    "bias": {"bias": randn(H, L, S)},
    "bias of -inf": {"bias": randn(1, L, S).masked_fill(chance(0.7, 1, L, S), -torch.inf), "causal": True},
    "segments": {
        "segment_ids": (torch.tensor([[0, 0, 1, 1, -1]] * B), torch.tensor([[0, 0, 0, 2, 1, -1, 5]] * B))
    },
    "lengths": {"key_lengths": torch.tensor([0, 3])},
    "lengths in a window": {"key_lengths": torch.tensor([6, 3]), "window": (2, 0)},
    "alibi": {"alibi_slopes": randn(B, H).abs(), "causal": True},
    "alibi and bias": {"alibi_slopes": randn(H).abs(), "bias": randn(L, S), "mask": chance(0.5, L, S)},
    "sinks": {"sinks": randn(H), "key_lengths": torch.tensor([0, 3])},
    "a sink of -inf": {
        "sinks": torch.tensor([0.0, -torch.inf, 1.0, 2.0]),
        "key_lengths": torch.tensor([0, 3]),
    },
    "softcap": {"softcap": 2.0, "causal": "top_left"},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3, "causal": True},
    "scale of 0": {"scale": 0.0},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3, "causal": True},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def results_of(function: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Results and the gradients of all operands under the same upstream gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    used = [torch.where(r.isfinite(), r, 0) for r in results]
    total = sum((u * randn(*u.shape, seed=9).to(u.dtype)).sum() for u in used)
    return [*results, *torch.autograd.grad(total, leaves)]


@by_options
@pytest.mark.parametrize(
    "returned",
    [{}, {"return_lse": True}, {"return_lse": True, "return_weights": True}, {"return_weights": "mean"}],
    ids=["out", "lse", "all", "mean weights"],
)
def test_plain_torch_computes_the_same(options: dict[str, Any], returned: dict[str, Any]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with plain_torch():
            actual = results_of(fastattn.attention, qkv(dtype), **options, **returned)
        golden = results_of(reference.attention, [t.double() for t in qkv(dtype)], **options, **returned)
        if dtype == torch.float64:  # no dtype is exacter
            for a, g in zip(actual, golden, strict=True):
                torch.testing.assert_close(a, g)
            continue
        formula = partial(results_of, reference.attention, qkv(dtype), **options, **returned)
        plain = plain_in_any_order(formula, golden)
        for i, (a, p, g) in enumerate(zip(actual, plain, golden, strict=True)):
            assert a.dtype == (torch.float32 if i == 1 and "return_lse" in returned else dtype)
            assert_within_rule(a, p, g, f"result {i} in {dtype}", dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths": torch.tensor([5, 3])},
        {"mask": (torch.arange(S) < torch.tensor([5, 3])[:, None])[:, None, None]},
        {"bias": torch.where(torch.arange(S) < 3, 0.0, -torch.inf).double()},
        {"segment_ids": (torch.zeros(B, L).int(), torch.where(torch.arange(S) < 3, 0, -1).expand(B, S))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_keys_that_nobody_sees_may_be_nan(options: dict[str, Any]) -> None:
    q, k, v = qkv()
    lengths = options.get("key_lengths", torch.tensor([5, 3] if "mask" in options else [3, 3]))
    poison = torch.arange(S) >= lengths[:, None]
    with plain_torch():
        clean = results_of(fastattn.attention, [q, k, v], **options)
        poisoned = [t.masked_fill(poison[:, None, :, None], torch.nan) for t in (k, v)]
        for expected, actual in zip(clean, results_of(fastattn.attention, [q, *poisoned], **options)):
            torch.testing.assert_close(actual, expected)


VARLEN = {
    "causal": {"causal": True, "return_lse": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (1, 1)},
    "slopes": {"alibi_slopes": randn(3, H), "softcap": 3.0, "return_lse": True},
    "sinks": {"sinks": randn(H), "alibi_slopes": randn(H)},
}


@pytest.mark.parametrize("options", VARLEN.values(), ids=VARLEN)
def test_packed_sequences(options: dict[str, Any]) -> None:
    """With an empty sequence, queries without keys, and tokens that belong to none."""
    cu_seqlens = torch.tensor([0, 3, 3, 8]).int(), torch.tensor([0, 4, 9, 9]).int()
    tensors = [randn(n, heads, D, seed=i) for i, (n, heads) in enumerate(((9, H), (10, HKV), (10, HKV)))]

    def call(function: Callable[..., Any]) -> list[Tensor]:
        return results_of(lambda *operands: function(*operands, *cu_seqlens, **options), tensors)

    with plain_torch():
        actual = call(fastattn.attention_varlen)
    for a, e in zip(actual, call(reference.attention_varlen)):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": (2, 0), "softcap": 2.0}, {"causal": "top_left"}], ids=str)
def test_a_cache(paged: bool, options: dict[str, Any]) -> None:
    query, new = randn(B, H, 3, D), randn(2, B, HKV, 3, D, seed=1)
    shape = (2, 5, HKV, 4, D) if paged else (2, B, HKV, 9, D)
    table = {"block_table": torch.tensor([[3, 0, 77], [1, 4, 2]]).int()} if paged else {}
    rotary = {"rotary_cos": randn(12, 2, seed=5), "rotary_sin": randn(12, 2, seed=6)}
    found = []
    for enabled in (False, True):
        caches = randn(*shape, seed=2)
        with plain_torch(enabled):
            results = fastattn.attention_kv_cache(
                query, *caches, torch.tensor([4, 6]).int(), key=new[0], value=new[1], return_lse=True,
                alibi_slopes=randn(H, seed=7), **table, **rotary, **options,
            )  # fmt: skip
        found.append((*results, caches))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected)


class Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *operands: Tensor) -> Any:
        return self.call(*operands)


def targets(graph: Any) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def foreign(graph: Any) -> list[str]:
    return [str(target) for target in targets(graph) if "fastattn" in str(target)]


EXPORTED: dict[str, tuple[Callable[..., Any], bool]] = {  # and whether torch's own attention expresses it
    "plain": (lambda q, k, v: fastattn.attention(q, k, v), True),
    "causal": (lambda q, k, v: fastattn.attention(q, k, v, causal=True), True),
    "top left": (lambda q, k, v: fastattn.attention(q, k, v, causal="top_left"), True),
    "window": (lambda q, k, v: fastattn.attention(q, k, v, window=(3, 0)), True),
    "lengths": (lambda q, k, v: fastattn.attention(q, k, v, key_lengths=torch.full((B,), 3)), True),
    "bias": (lambda q, k, v: fastattn.attention(q, k, v, bias=q.amax(-1)[..., None]), True),
    "lse": (lambda q, k, v: fastattn.attention(q, k, v, return_lse=True), False),
    "softcap": (lambda q, k, v: fastattn.attention(q, k, v, softcap=3.0), False),
    "weights": (lambda q, k, v: fastattn.attention(q, k, v, return_weights="mean", causal=True), False),
    "sdpa": (
        lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        True,
    ),
    "varlen": (
        lambda q, k, v: fastattn.attention_varlen(
            *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), *(torch.tensor([0, 3, 8]).int(),) * 2
        ),
        True,
    ),
    "cache": (lambda q, k, v: fastattn.attention_kv_cache(q, k, v, torch.full((B,), 5).int()), True),
    "softmax": (lambda q, k, v: fastattn.softmax(q, causal=True), False),
    "losses": (
        lambda q, k, v: (
            fastattn.cross_entropy(q[0, 0], torch.zeros_like(q[0, 0, :, 0]).long())
            + fastattn.linear_cross_entropy(q[0, 0], q.new_ones(3, D), torch.zeros_like(q[0, 0, :, 0]).long())
        ),
        False,
    ),
}


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


def test_the_context() -> None:
    tensors = qkv()

    def ops(call: Callable[..., Any]) -> list[str]:
        return foreign(make_fx(call)(*tensors).graph)

    call = EXPORTED["plain"][0]
    assert ops(call)
    with plain_torch():
        assert not ops(call)
        with plain_torch(False):
            assert ops(call)
        assert not ops(call)
        with pytest.raises(ZeroDivisionError), plain_torch(False):
            raise ZeroDivisionError
        assert not ops(call)
    assert ops(call)
    assert not ops(plain_torch()(call))
    with pytest.raises(TypeError, match="enabled: got str, needs a bool"):
        plain_torch("yes")


def test_compiled_code_follows_the_context() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(EXPORTED["causal"][0], backend=keep, fullgraph=True)
    with torch.no_grad():
        for enabled in (None, True, None):
            if enabled:
                with plain_torch():
                    out = compiled(*qkv())
            else:
                out = compiled(*qkv())
            torch.testing.assert_close(out, fastattn.attention(*qkv(), causal=True))
    assert ["fastattn" in graph.code for graph in graphs] == [True, False]


class Encoder(nn.Module):
    """Embeds nothing, attends with padding: what people export."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layers(x, src_key_padding_mask=padding)


def encoder(swapped: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Encoder().eval().to(dtype)
    if swapped:
        assert len(fastattn.swap_attention(model).swapped) == 2
    return model


def padded(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    padding = torch.arange(length) >= torch.tensor([length, length - 3, 1, length - 1])[:batch, None]
    return randn(batch, length, 32, dtype=dtype), padding


def assert_as_exact(actual: Any, batch: int, length: int) -> None:
    x, padding = padded(batch, length)
    with torch.no_grad():
        golden = encoder(swapped=False, dtype=torch.float64)(x.double(), padding)
        theirs = plain_in_any_order(partial(encoder(swapped=False), x, padding), golden)
    assert_within_rule(torch.as_tensor(actual), theirs, golden)


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


def onnx_runtime() -> Any:
    if torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 exports no model of dynamic batch and length to ONNX")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


def run_onnx(program: Any, *inputs: Tensor) -> list[np.ndarray]:
    stored = io.BytesIO()
    program.save(stored)
    session = onnx_runtime().InferenceSession(stored.getvalue(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs)})


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_swapped_encoder() -> None:
    onnx_runtime()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        encoder(), padded(2, 7), dynamic_shapes=({0: batch, 1: length},) * 2, dynamo=True, verbose=False
    )
    for sizes in ((2, 7), (4, 11)):
        assert_as_exact(run_onnx(program, *padded(*sizes))[0], *sizes)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_swapped_bert() -> None:
    onnx_runtime()
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    def bert(dtype: torch.dtype, implementation: str = "eager") -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return (
            BertModel(BertConfig(vocab_size=50, **sizes, attn_implementation=implementation)).eval().to(dtype)
        )

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        mask = (~padded(batch, length)[1]).long()
        return torch.arange(batch * length).view(batch, length) % 50, mask

    swapped = bert(torch.float32)
    assert fastattn.swap_attention(swapped).swapped
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        swapped, inputs(2, 7), input_names=["input_ids", "attention_mask"], dynamo=True, verbose=False,
        dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
    )  # fmt: skip
    for sizes in ((2, 7), (4, 11)):
        given = inputs(*sizes)
        hidden, pooled = run_onnx(program, *given)
        with torch.no_grad():
            plain, golden = (bert(dtype)(*given) for dtype in (torch.float32, torch.float64))
        assert_within_rule(torch.tensor(hidden), plain.last_hidden_state, golden.last_hidden_state)
        assert_within_rule(torch.tensor(pooled), plain.pooler_output, golden.pooler_output)


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_aotinductor_package_runs_where_fastattn_is_not(tmp_path: Any) -> None:
    torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "aoti.pt2"))
    loaded_elsewhere(tmp_path, "aoti")


class Mixed(nn.Module):
    """Modules and functions of attention, as a model calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out, weights = self.attn(x, x, x, key_padding_mask=padding)
        return out + F.scaled_dot_product_attention(x, x, x) + weights.sum()


def test_symbolic_tracing_takes_a_swapped_module_whole_as_torchs() -> None:
    model, (x, padding) = Mixed().eval(), padded(2, 7)
    expected = torch.fx.symbolic_trace(model)
    fastattn.swap_attention(model)
    with fastattn.sdpa_override():
        actual = torch.fx.symbolic_trace(model)
    assert targets(actual.graph) == targets(expected.graph)
    assert [n.kwargs for n in actual.graph.find_nodes(op="call_module", target="attn")] == [
        {"key_padding_mask": ANY}
    ]
    assert isinstance(actual.attn, fastattn.MultiHeadAttention)
    torch.testing.assert_close(actual(x, padding), model(x, padding))
    with pytest.raises(TraceError, match="trace a module that contains it"):
        torch.fx.symbolic_trace(model.attn)


def test_symbolic_tracing_records_functions_with_the_arguments_given() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Any:
        attended = fastattn.attention(q, k, v, causal=True, return_lse=True)
        packed = fastattn.attention_varlen(q[0].mT, k[0].mT, v[0].mT, cu_seqlens, cu_seqlens, 5)
        cached = fastattn.attention_kv_cache(q, k, v, cu_seqlens)
        dots = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
        probs = fastattn.softmax(q, 1, log=True)
        losses = (
            fastattn.cross_entropy(q, cu_seqlens),
            fastattn.linear_cross_entropy(q, k, cu_seqlens, softcap=2.0),
        )
        return attended[0], packed, cached, dots, probs, losses

    graph = torch.fx.symbolic_trace(function).graph
    recorded = {
        node.target.__name__: node.kwargs
        for node in graph.nodes
        if node.op == "call_function" and node.target.__module__.startswith("fastattn")
    }
    given = {name: set(kwargs) for name, kwargs in recorded.items()}
    assert given == {
        "attention": {"query", "key", "value", "causal", "return_lse"},
        "attention_varlen": {"query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"},
        "attention_kv_cache": {"query", "k_cache", "v_cache", "cache_lengths"},
        "scaled_dot_product_attention": {"query", "key", "value", "is_causal"},
        "softmax": {"x", "dim", "log"},
        "cross_entropy": {"logits", "target"},
        "linear_cross_entropy": {"hidden", "weight", "target", "softcap"},
    }
    module = torch.fx.symbolic_trace(lambda q, k, v: fastattn.attention(q, k, v, causal=True))
    torch.testing.assert_close(module(*qkv()), fastattn.attention(*qkv(), causal=True))


def test_torchscript_names_what_helps() -> None:
    model = Mixed()
    fastattn.swap_attention(model)
    with pytest.raises(RuntimeError, match=r"fastattn\.restore_attention\(model\)"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match="restore_attention"):
        torch.jit.script(fastattn.MultiHeadAttention(32, 4))
    fastattn.restore_attention(model)
    torch.jit.script(model.attn)
