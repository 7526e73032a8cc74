"""diffusers' attention backends: "fastattn" is one after `register()`, with diffusers or a stand-in of its registry."""

import copy
import enum
import inspect
import pickle
import subprocess
import sys
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn.integrations import diffusers as integration
from fastattn.ops import sdpa as sdpa_module


def stand_in():
    """A module with what diffusers' has: a closed str Enum of names, and a registry that remembers parameters."""
    module = types.ModuleType("diffusers.models.attention_dispatch")

    class AttentionBackendName(str, enum.Enum):
        NATIVE = "native"
        FLEX = "flex"

    class _AttentionBackendRegistry:
        _backends: ClassVar = {}
        _supported_arg_names: ClassVar = {}

        @classmethod
        def register(cls, backend, constraints=None, supports_context_parallel=False):
            def decorate(function):
                cls._backends[backend] = function
                cls._supported_arg_names[backend] = set(inspect.signature(function).parameters)
                return function

            return decorate

    def dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        *,
        backend,
    ):
        given = {
            "query": query, "key": key, "value": value, "attn_mask": attn_mask, "dropout_p": dropout_p,
            "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "_parallel_config": None,
        }  # fmt: skip
        name = AttentionBackendName(backend)
        supported = _AttentionBackendRegistry._supported_arg_names[name]
        function = _AttentionBackendRegistry._backends[name]
        return function(**{n: value for n, value in given.items() if n in supported})

    AttentionBackendName.__qualname__ = "AttentionBackendName"
    for thing in (AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn):
        thing.__module__ = module.__name__
        setattr(module, thing.__name__, thing)
    return module


@pytest.fixture(params=["stand-in", "diffusers"])
def dispatch(request, monkeypatch):
    if request.param == "diffusers":
        return pytest.importorskip("diffusers.models.attention_dispatch")
    module = stand_in()
    for name in ("diffusers", "diffusers.models"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def calls(monkeypatch):
    seen = []
    attention = sdpa_module.attention
    monkeypatch.setattr(
        sdpa_module, "attention", lambda *a, **k: seen.append(k["backend"]) or attention(*a, **k)
    )
    return seen


def test_registers_names_that_look_like_the_others(dispatch):
    integration.register()
    integration.register()
    names = dispatch.AttentionBackendName
    member = names("fastattn")
    assert member is names.FASTATTN is names["FASTATTN"]
    assert (member.value, member.name, member) == ("fastattn", "FASTATTN", "fastattn")
    assert list(names).count(member) == 1
    assert {"fastattn", "fastattn_torch", "fastattn_triton"} <= {x.value for x in names.__members__.values()}
    assert repr(member) == "<AttentionBackendName.FASTATTN: 'fastattn'>"
    assert names("native") is names.NATIVE
    assert "fastattn" in dispatch._AttentionBackendRegistry._backends
    with pytest.raises(ValueError, match="nope"):
        names("nope")


MASKS = {
    "none": None,
    "keys": torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),
    "full": torch.rand(2, 1, 5, 7) < 0.7,
    "added": torch.randn(2, 4, 5, 7),
    "added to keys": torch.randn(2, 7),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_layout_masks_and_options(dispatch, calls, mask, scale):
    options = {"scale": scale, "is_causal": mask == "none"}
    integration.register()
    q, k, v = (torch.randn(2, n, 4, 8) for n in (5, 7, 7))
    mask = MASKS[mask]
    out = dispatch.dispatch_attention_fn(q, k, v, mask, **options, backend="fastattn")
    wide = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, wide, **options).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
    dispatch.dispatch_attention_fn(q, k, v, backend="fastattn_torch")
    assert calls == ["auto", "torch"]


def test_fewer_keys_and_dropout(dispatch):
    integration.register()
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
    out = dispatch.dispatch_attention_fn(q, k, k, enable_gqa=True, backend="fastattn")
    heads_first = [t.transpose(1, 2) for t in (q, k, k)]
    torch.testing.assert_close(
        out.transpose(1, 2), F.scaled_dot_product_attention(*heads_first, enable_gqa=True)
    )
    assert not dispatch.dispatch_attention_fn(
        q, k, k, enable_gqa=True, dropout_p=1.0, backend="fastattn"
    ).any()


def test_copies_and_pickles(dispatch):
    integration.register()
    for name in ("fastattn", "native"):
        member = dispatch.AttentionBackendName(name)
        assert copy.deepcopy(member) is copy.copy(member) is member
        assert pickle.loads(pickle.dumps(member)) is member


@pytest.mark.parametrize(
    "options", [{"return_lse": True}, {"_parallel_config": object()}], ids=["return_lse", "_parallel_config"]
)
def test_refused_by_name(options):
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match=next(iter(options))):
        integration.attention(q, q, q, **options)


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("AttentionBackendName", "AttentionBackendName"),
        ("_AttentionBackendRegistry", "_AttentionBackendRegistry"),
        ("dispatch_attention_fn", "dispatch_attention_fn"),
        ("enable_gqa", "dispatch_attention_fn has no enable_gqa"),
    ],
)
@pytest.mark.parametrize("dispatch", ["stand-in"], indirect=True)
def test_a_registry_of_another_make_is_an_import_error(dispatch, monkeypatch, missing, match):
    if missing == "enable_gqa":
        monkeypatch.setattr(
            dispatch, "dispatch_attention_fn",
            lambda query, key, value, attn_mask, dropout_p, is_causal, scale: None,
        )  # fmt: skip
    else:
        monkeypatch.delattr(dispatch, missing)
    with pytest.raises(ImportError, match=match):
        integration.register()


def test_without_diffusers_it_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    with pytest.raises(ImportError, match="needs diffusers"):
        integration.register()


def tiny_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def run(model):
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([1.0]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return model(**inputs).sample


def test_a_model_gives_the_same(calls):
    model = tiny_model()
    expected = run(model)
    integration.register()
    model.set_attention_backend("fastattn")
    try:
        torch.testing.assert_close(run(model), expected)
        assert len(calls) == 2
        grads = torch.autograd.grad(run(model).square().sum(), list(model.parameters()), allow_unused=True)
        stored = pickle.dumps(model)
    finally:
        model.set_attention_backend("native")
    before = torch.autograd.grad(run(model).square().sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(grads, before, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4
    again = subprocess.run(
        [
            sys.executable, "-c",
            "import pickle, sys; model = pickle.load(sys.stdin.buffer);"
            "print(next(m.processor._attention_backend.value for m in model.modules() if hasattr(m, 'processor')))",
        ],
        input=stored, capture_output=True, check=True,
    )  # fmt: skip
    assert again.stdout.decode().split() == ["fastattn"]


def test_it_is_reachable_as_a_module():
    assert fastattn.integrations.diffusers.register is integration.register
