"""Each private symbol of torch can go: fastattn imports, attention is right, and the documented fallback is taken."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastattn
from fastattn import reference, torch_compat
from fastattn.integrations import sdpa_names
from fastattn.nn import linear as linear_module
from fastattn.nn.norms import rms_norm
from fastattn.torch_compat.lookup import find

HOME = Path(torch_compat.__file__).parent
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted(HOME.glob("*.py"))}
LOOKUPS = [
    node
    for source in SOURCES.values()
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "find"
]
SYMBOLS = sorted(node.args[0].value for node in LOOKUPS if isinstance(node.args[0], ast.Constant))
FUNCTIONS = {
    name: getattr(torch_compat, name)
    for name in torch_compat.__all__
    if callable(getattr(torch_compat, name))
}


def without(*symbols: str) -> dict[str, str]:
    """torch_compat's sources, by file, that change for a torch that lacks these."""
    changed = {}
    for symbol in symbols:
        assert any(f'"{symbol}"' in source for source in SOURCES.values())
    for name, source in SOURCES.items():
        text = source
        for symbol in symbols:
            text = text.replace(f'"{symbol}"', f'"{symbol}_gone"')
        if text != source:
            changed[name] = text
    return changed


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch_compat what it is where torch lacks some symbols."""

    def lack(*symbols: str) -> None:
        for file, source in without(*symbols).items():
            module = importlib.import_module(f"{torch_compat.__name__}.{Path(file).stem}")
            changed = ModuleType(module.__name__)
            changed.__package__ = torch_compat.__name__
            exec(compile(source, str(HOME / file), "exec"), vars(changed))
            for name, value in vars(changed).items():
                if not name.startswith("__"):
                    monkeypatch.setattr(module, name, value)
                    if name in torch_compat.__all__:
                        monkeypatch.setattr(torch_compat, name, value)

    return lack


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, 40, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def check_against_reference(dtype: torch.dtype = torch.float64) -> None:
    """Attention with features, softmax, and the gradients of both."""
    inputs = operands(dtype)
    features: dict[str, Any] = {"causal": True, "window": (8, 0), "dropout_p": 0.25, "dropout_seed": 7}
    for options in ({}, {"causal": True}, features):
        out, expected = (f(*inputs, **options) for f in (fastattn.attention, reference.attention))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), inputs) for o in (out, expected)))
    x = inputs[0]
    for log in (False, True):
        expected = torch.log_softmax(x, -1) if log else torch.softmax(x, -1)
        for call in (fastattn.softmax(x, log=log), fastattn.softmax(x.mT, 2, log=log).mT):
            torch.testing.assert_close(call, expected)
            torch.testing.assert_close(
                torch.autograd.grad(call.sin().sum(), x),
                torch.autograd.grad(expected.sin().sum(), x, retain_graph=True),
            )


def test_every_symbol_is_looked_up_by_its_literal_name() -> None:
    assert len(SYMBOLS) == len(LOOKUPS)


def test_the_package_exports_every_function_and_nothing_that_is_not_there() -> None:
    """A module that binds a private name of another would miss its fallback, so none imports another but `lookup`."""
    public = set()
    for file, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                public.add(node.name)
            if isinstance(node, ast.ImportFrom) and node.level and file != "__init__.py":
                assert node.module == "lookup", file
    assert public - {"find"} == FUNCTIONS.keys()


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="other releases may lack some: that is the point"
)
def test_the_torch_of_ci_has_every_symbol() -> None:
    assert [s for s in SYMBOLS if find(s) is None] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_falls_back_to(name: str) -> None:
    doc = FUNCTIONS[name].__doc__ or ""
    asked_for = name.startswith(("cpu_flash", "onednn_"))  # called only where has_... said yes
    assert doc
    assert "Fallback: " in doc or asked_for


def test_callers_use_the_module_so_that_nothing_is_bound_before_its_fallback() -> None:
    root = Path(fastattn.__file__).parent
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    for path in (*root.rglob("*.py"), *benchmarks.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert "from fastattn.torch_compat import" not in source, path
        for node in ast.parse(source).body if path.parent != HOME else ():
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert "torch_compat." not in ast.unparse(node), (
                    f"{path} uses torch_compat while it is imported"
                )


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_attention_is_right_without(symbol: str, lacking: Callable[..., None]) -> None:
    lacking(symbol)
    check_against_reference()
    check_against_reference(torch.float32)


def test_without_any_symbol_the_package_imports_and_attention_is_right(tmp_path: Path) -> None:
    for name, source in {**SOURCES, **without(*SYMBOLS)}.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    script = f"""
import importlib.util, pkgutil, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "fastattn.torch_compat":
            return importlib.util.spec_from_file_location(
                name, {str(tmp_path / "__init__.py")!r}, submodule_search_locations=[{str(tmp_path)!r}]
            )
sys.meta_path.insert(0, Finder())
import fastattn, fastattn.models, fastattn.train, fastattn.integrations.torch, fastattn.integrations.export
import fastattn.integrations.flash_attn, fastattn.integrations.diffusers, fastattn.integrations.transformers
import torch
assert fastattn.torch_compat.PLAIN_KEYS is None
q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
out, expected = (f(q, k, v, causal=True) for f in (fastattn.attention, fastattn.reference.attention))
torch.testing.assert_close(out, expected)
torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (out, expected)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr


# The documented fallback of each function, by the symbols that it needs.


DISPATCHER = [
    s for s in SYMBOLS if "DispatchKey" in s or "_dispatch_" in s or "profiler" in s or "function_stack" in s
]
DISPATCHER.remove("torch._C._len_torch_dispatch_stack")


@pytest.mark.parametrize("symbol", DISPATCHER)
def test_without_its_keys_every_call_takes_the_dispatcher(symbol: str, lacking: Callable[..., None]) -> None:
    assert len(DISPATCHER) == 6
    assert torch_compat.can_bypass_dispatcher(operands())
    lacking(symbol)
    assert not torch_compat.can_bypass_dispatcher(operands())


def test_required_gradients_are_asked_of_each_tensor(lacking: Callable[..., None]) -> None:
    lacking("torch._C._any_requires_grad")
    assert torch_compat.any_requires_grad([None, 1.0, torch.ones(1), torch.ones(1, requires_grad=True)])
    assert not torch_compat.any_requires_grad([None, "auto", torch.ones(1)])


TRANSFORMS = ("torch._C._are_functorch_transforms_active", "torch._C._functorch.is_functorch_wrapped_tensor")


@pytest.mark.parametrize("symbols", [TRANSFORMS[:1], TRANSFORMS[1:], TRANSFORMS])
def test_transforms_are_known_by_the_tensors_they_wrap(
    symbols: tuple[str, ...], lacking: Callable[..., None]
) -> None:
    lacking(*symbols)
    seen: list[tuple[bool, bool]] = []

    def watch(x: Tensor) -> Tensor:
        seen.append((torch_compat.transforms_active((None, x)), torch_compat.is_wrapped(x)))
        return x.sum()

    x = torch.randn(3, 4)
    torch.vmap(watch)(x)
    torch.func.grad(watch)(x)
    torch.func.jvp(watch, (x,), (x,))
    assert seen == [(True, True)] * 3
    watch(x)
    watch(x.to_sparse())
    assert seen[3:] == [(False, False)] * 2

    q, k, v = (t.detach() for t in operands(torch.float64))
    expected = torch.stack([reference.attention(q[i, None], k[i, None], v[i, None])[0] for i in range(2)])
    per_sample = torch.vmap(lambda q, k, v: fastattn.attention(q[None], k[None], v[None])[0])(q, k, v)
    torch.testing.assert_close(per_sample, expected)
    tangents = [
        torch.func.jvp(lambda q, f=f: f(q, k, v), (q,), (torch.ones_like(q),))
        for f in (fastattn.attention, reference.attention)
    ]
    torch.testing.assert_close(*tangents)


def test_without_a_count_of_modes_one_is_assumed(lacking: Callable[..., None]) -> None:
    assert not torch_compat.dispatch_mode_active()
    lacking("torch._C._len_torch_dispatch_stack")
    assert torch_compat.dispatch_mode_active()


def test_forward_mode_is_known_by_making_a_dual(lacking: Callable[..., None]) -> None:
    lacking("torch.autograd.forward_ad._current_level")
    assert not torch_compat.dual_level_entered()
    q, k, v = (t.detach() for t in operands(torch.float64))
    tangents = []
    with forward_ad.dual_level():
        assert torch_compat.dual_level_entered()
        for function in (fastattn.attention, reference.attention):
            dual = function(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
            tangents.append(forward_ad.unpack_dual(dual).tangent)
    torch.testing.assert_close(*tangents)
    compiled = torch.compile(lambda x: x + torch_compat.dual_level_entered(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 0.0


def test_without_the_flag_export_is_asked_by_the_public_function(
    lacking: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking("torch.compiler._is_exporting_flag")
    assert not torch_compat.is_exporting()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch_compat.is_exporting()


def test_without_fake_tensors_class_any_subclass_is_taken_for_one(lacking: Callable[..., None]) -> None:
    class Mine(Tensor):
        pass

    with FakeTensorMode():
        fake = torch.empty(1)
    mine = torch.ones(1).as_subclass(Mine)
    assert (torch_compat.is_fake(fake), torch_compat.is_fake(mine)) == (True, False)
    lacking("torch._subclasses.fake_tensor.FakeTensor")
    assert (torch_compat.is_fake(fake), torch_compat.is_fake(mine)) == (True, True)
    assert not torch_compat.is_fake(torch.ones(1))
    assert not torch_compat.is_fake(torch.nn.Parameter(torch.ones(1)))


def test_torchs_attention_is_what_stood_in_functional_at_import(lacking: Callable[..., None]) -> None:
    theirs = torch_compat.torch_sdpa()
    lacking("torch._C._nn.scaled_dot_product_attention")
    assert torch_compat.torch_sdpa() is torch.nn.functional.scaled_dot_product_attention is theirs
    assert sdpa_names.torch_compat is torch_compat


FUSED = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("forward", [True, False])
def test_without_the_fused_kernel_tiles_are_blockwise(
    forward: bool, lacking: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = f"torch.ops.aten.{FUSED}"
    lacking(*((f"torch.{FUSED}", f"{ops}.default") if forward else (f"{ops}_backward.default",)))
    q, k, v = operands()
    assert ("blockwise" in fastattn.explain(q, k, v).tiles) == forward

    def fail(*args: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(torch_compat, "cpu_flash_attention_backward", fail)
    if forward:
        monkeypatch.setattr(torch_compat, "cpu_flash_attention", fail)
    fastattn.attention(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_without_its_kernel_softmax_is_torchs_function(
    log: bool, dtype: torch.dtype, lacking: Callable[..., None]
) -> None:
    x, outs = torch.randn(5, 33), [torch.empty(5, 33, dtype=dtype) for _ in range(4)]
    torch_compat.softmax(outs[0], x, 1, log=log)
    torch_compat.softmax(outs[1].T, x.T, 0, log=log)
    lacking("torch.ops.aten._softmax", "torch.ops.aten._log_softmax")
    torch_compat.softmax(outs[2], x, 1, log=log)
    torch_compat.softmax(outs[3].T, x.T, 0, log=log)
    torch.testing.assert_close(outs[0], (x.log_softmax(1) if log else x.softmax(1)).to(dtype))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("log", [False, True])
def test_without_its_kernel_the_backward_of_softmax_is_the_formula(
    log: bool, dtype: torch.dtype, lacking: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    x, dout = torch.randn(5, 33, dtype=torch.float64), torch.randn(5, 33, dtype=dtype)
    out = (x.log_softmax(1) if log else x.softmax(1)).to(dtype)
    by_torch, by_formula = torch.empty_like(out), torch.empty_like(out)
    torch_compat.softmax_backward(by_torch, dout, out, 1, log=log)
    lacking("torch.ops.aten._softmax_backward_data", "torch.ops.aten._log_softmax_backward_data")
    torch_compat.softmax_backward(by_formula, dout, out, 1, log=log)
    torch.testing.assert_close(by_formula, by_torch)


def test_without_onednn_linear_layers_are_torchs(lacking: Callable[..., None]) -> None:
    lacking("torch.ops.mkldnn._linear_pointwise")
    assert not torch_compat.has_onednn_linear()
    x, weight = torch.randn(1, 1024), torch.randn(1024, 1024)
    assert weight.numel() >= linear_module.ONEDNN_MIN_WEIGHTS
    with torch.no_grad():
        assert torch.equal(linear_module.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_without_layer_norms_kernel_the_gradient_of_rms_norm_is_the_formula(
    lacking: Callable[..., None],
) -> None:
    x, weight = torch.randn(5, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(rms_norm(x, weight, 1e-6).sin().sum(), [x, weight])
    lacking("torch.ops.aten.native_layer_norm_backward")
    torch.testing.assert_close(
        torch.autograd.grad(rms_norm(x, weight, 1e-6).sin().sum(), [x, weight]), expected
    )


def test_without_versions_none_is_known(lacking: Callable[..., None]) -> None:
    x = torch.ones(1)
    before = torch_compat.version_of(x)
    x.add_(1)
    assert before is not None
    assert torch_compat.version_of(x) == before + 1
    lacking("torch.Tensor._version")
    assert torch_compat.version_of(x) is None


@pytest.mark.parametrize("symbol", [s for s in SYMBOLS if "flash_attention" in s and "for_cpu" not in s])
def test_without_flash_ops_there_is_nothing_to_override(symbol: str, lacking: Callable[..., None]) -> None:
    lacking(symbol)
    with pytest.raises(RuntimeError, match="no flash-attention ops"):
        torch_compat.override_flash_attention("CUDA", print, print)


def test_without_cuda_sleep_nothing_is_queued(lacking: Callable[..., None]) -> None:
    lacking("torch.cuda._sleep")
    torch_compat.cuda_sleep(1)


def test_without_its_kernel_several_copies_are_one_after_another(lacking: Callable[..., None]) -> None:
    sources = torch.randn(2, 3), torch.randn(4)
    for targets in ((torch.zeros(2, 3), torch.zeros(4)) for _ in range(2)):
        torch_compat.copy_of_several()(targets, sources)
        assert all(torch.equal(target, source) for target, source in zip(targets, sources))
        lacking("torch._foreach_copy_")


def test_without_the_loaders_method_workers_end_with_the_iterator(lacking: Callable[..., None]) -> None:
    lacking("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers")
    batches = iter(torch.utils.data.DataLoader(range(4), num_workers=1))  # type: ignore[arg-type]
    torch_compat.end_loader_workers(batches)
    assert next(batches).item() == 0
