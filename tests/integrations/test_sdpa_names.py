"""`sdpa_override` counts its calls, says when none came, and reaches names that modules imported."""

import importlib.util
import sys
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn import torch_compat
from fastattn.ops import sdpa as sdpa_module

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """The backend of every call that fastattn's function gets."""
    seen = []
    attention = sdpa_module.attention
    monkeypatch.setattr(
        sdpa_module, "attention", lambda *a, **k: seen.append(k["backend"]) or attention(*a, **k)
    )
    return seen


def qkv(dim=8):
    return torch.randn(3, 2, 4, 5, dim).unbind()


class Calls(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def module_of(code, name):
    """A module that ran `code`, in sys.modules until the test ends."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module


@pytest.fixture
def imported():
    names = []

    def make(code, name="sdpa_user"):
        names.append(name)
        return module_of(code, name)

    yield make
    for name in names:
        sys.modules.pop(name, None)


BY_NAME = "from torch.nn.functional import scaled_dot_product_attention"


@pytest.mark.parametrize(
    "code",
    [BY_NAME, BY_NAME + " as attend", "import torch\nkept = torch._C._nn.scaled_dot_product_attention"],
)
def test_reaches_modules_that_imported_the_function_before(calls, imported, code):
    module = imported(code)
    before = dict(module.__dict__)
    name = next(n for n, value in before.items() if value is ORIGINAL)
    for _ in range(2):
        with fastattn.sdpa_override() as override:
            assert module.__dict__[name] is F.scaled_dot_product_attention
            module.__dict__[name](*qkv())
            assert override.calls == 1
        assert module.__dict__ == before
        assert module.__dict__[name] is ORIGINAL
    assert calls == ["auto", "auto"]


def test_a_module_imported_inside_holds_torchs_function_afterwards(calls, imported):
    with fastattn.sdpa_override():
        outer = imported(BY_NAME, "sdpa_user")
        with fastattn.sdpa_override("torch"):
            inner = imported(BY_NAME, "sdpa_user_within")
            outer.scaled_dot_product_attention(*qkv())
            inner.scaled_dot_product_attention(*qkv())
        assert inner.scaled_dot_product_attention is F.scaled_dot_product_attention
        inner.scaled_dot_product_attention(*qkv())
    assert outer.scaled_dot_product_attention is inner.scaled_dot_product_attention is ORIGINAL
    assert calls == ["torch", "torch", "auto"]


def test_a_module_loaded_again_under_its_name_is_reached(calls, imported):
    for _ in range(3):
        module = imported(BY_NAME)
        with fastattn.sdpa_override():
            module.scaled_dot_product_attention(*qkv())
        assert module.scaled_dot_product_attention is ORIGINAL
        del sys.modules["sdpa_user"]
    assert calls == ["auto"] * 3


def test_a_name_that_somebody_changes_meanwhile_stays_changed(imported):
    module = imported(BY_NAME)
    with fastattn.sdpa_override():
        F.scaled_dot_product_attention(*qkv())
        module.scaled_dot_product_attention = other = object()
    assert module.scaled_dot_product_attention is other


def test_what_typed_code_imports_is_looked_for_each_time(calls, monkeypatch):
    """A notebook's globals change between one context and the next, without a module being added."""
    main = sys.modules["__main__"]
    with fastattn.sdpa_override():
        F.scaled_dot_product_attention(*qkv())
    monkeypatch.setattr(main, "attend", ORIGINAL, raising=False)
    with fastattn.sdpa_override():
        main.attend(*qkv())
    assert main.attend is ORIGINAL
    assert len(calls) == 2


def test_lazy_modules_are_not_woken(imported):
    imported("woken = []\ndef __getattr__(name):\n    woken.append(name)\n    raise AttributeError(name)")
    with fastattn.sdpa_override():
        F.scaled_dot_product_attention(*qkv())
    assert sys.modules["sdpa_user"].woken == []


def test_a_module_that_loads_when_looked_at_is_not_woken_and_found_once_loaded(calls, tmp_path, monkeypatch):
    (tmp_path / "sdpa_lazy.py").write_text(BY_NAME)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.find_spec("sdpa_lazy")
    spec.loader = loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sdpa_lazy", module)
    loader.exec_module(module)
    with fastattn.sdpa_override():
        F.scaled_dot_product_attention(*qkv())
        assert type(module) is not types.ModuleType
    for _ in range(2):
        with fastattn.sdpa_override():
            module.scaled_dot_product_attention(*qkv())
        assert module.scaled_dot_product_attention is ORIGINAL
    assert calls == ["auto"] * 3


def test_another_replacement_of_torchs_function_keeps_its_way_back(calls, imported, monkeypatch):
    """A call that fastattn leaves to the replacement must reach torch's function, not the replacement again."""
    module = imported(
        BY_NAME + " as original\ncame = []\n"
        "def replacement(*args, **options):\n    came.append(1)\n    return original(*args, **options)"
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", module.replacement)
    holder = imported(
        "from torch.nn.functional import scaled_dot_product_attention as replaced", "sdpa_holder"
    )
    wide = qkv(300)
    with fastattn.sdpa_override():
        torch.testing.assert_close(F.scaled_dot_product_attention(*wide), ORIGINAL(*wide))
        holder.replaced(*qkv())
        module.original(*qkv())
    assert module.came == [1]
    assert calls == ["auto", "auto"]
    assert F.scaled_dot_product_attention is holder.replaced is module.replacement
    assert module.original is ORIGINAL


def test_a_function_kept_past_the_end_is_torchs(calls):
    with fastattn.sdpa_override():
        kept = F.scaled_dot_product_attention
        kept(*qkv())
    q, k, v = qkv()
    torch.testing.assert_close(kept(q, k, v), ORIGINAL(q, k, v))
    assert calls == ["auto"]


def test_calls_are_counted(calls):
    override = fastattn.sdpa_override()
    assert override.calls == 0
    with override as entered:
        assert entered is override
        for number in range(1, 4):
            F.scaled_dot_product_attention(*qkv())
            assert override.calls == number
        with fastattn.sdpa_override("torch") as inner, override:
            F.scaled_dot_product_attention(*qkv())
        assert (override.calls, inner.calls) == (4, 1)
    F.scaled_dot_product_attention(*qkv())
    with override:
        F.scaled_dot_product_attention(*qkv())
    assert override.calls == 5
    assert len(calls) == 5


def test_calls_of_all_threads_are_counted():
    def work():
        for _ in range(20):
            F.scaled_dot_product_attention(*qkv())

    with fastattn.sdpa_override() as override:
        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert override.calls == 100


def test_leaving_without_a_call_warns(imported):
    softmax_by_itself = torch.randn(2, 3, 3)
    with pytest.warns(RuntimeWarning, match="without any call"), fastattn.sdpa_override():
        softmax_by_itself.softmax(-1)


@pytest.mark.parametrize("inner", [False, True])
def test_no_warning_where_a_call_came(inner):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastattn.sdpa_override("torch"):
            if inner:
                with fastattn.sdpa_override("torch"):
                    F.scaled_dot_product_attention(*qkv())
            else:
                F.scaled_dot_product_attention(*qkv())
        with pytest.raises(KeyError), fastattn.sdpa_override():
            raise KeyError  # has its own message


def test_a_decorated_function_counts_and_warns(calls):
    override = fastattn.sdpa_override("torch")

    @override
    def function(*tensors):
        """What it does."""
        return F.scaled_dot_product_attention(*tensors) if tensors else None

    assert function.__name__ == "function"
    assert function.__doc__ == "What it does."
    function(*qkv())
    function(*qkv())
    assert override.calls == 2
    with pytest.warns(RuntimeWarning, match="without any call"):
        function()


async def _coroutine():
    pass


def _generator():
    yield


@pytest.mark.parametrize("what", [_coroutine, _generator, nn.Linear])
def test_what_cannot_be_decorated_is_refused(what):
    with pytest.raises(TypeError, match="needs a plain function"):
        fastattn.sdpa_override()(what)


def test_a_compiled_call_is_no_silence():
    torch._dynamo.reset()
    model = torch.compile(Calls(), backend="eager", fullgraph=True)
    x = torch.randn(2, 6, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):  # compiled the first time only
            with fastattn.sdpa_override("torch") as outer, fastattn.sdpa_override("torch") as override:
                model(x)
                model(x)
            assert override.calls == 1
            assert outer.calls == 1


def test_entering_again_looks_through_new_modules_only(monkeypatch):
    from fastattn.integrations import sdpa_names

    read = []
    globals_of = sdpa_names.globals_of
    monkeypatch.setattr(sdpa_names, "globals_of", lambda module: read.append(module) or globals_of(module))
    names, torchs = sdpa_names.ImportedNames(), torch_compat.torch_sdpa()
    # hold no name of torch's
    modules = [types.ModuleType(f"made_for_a_test_{number}") for number in range(2)]
    for new in modules:
        monkeypatch.setitem(sys.modules, new.__name__, new)
        read.clear()
        names.exchange(lambda: None, lambda: None, torchs)
        assert [module for module in modules if module in read] == [new]
        names.give_back(torchs)
