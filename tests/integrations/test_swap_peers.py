"""Modules of timm, openai-whisper and diffusers: swapped where their own switch allows it, else told what helps."""

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn.integrations import swap_peers

WIDTH = 16


def heads(x, width):
    return x.unflatten(-1, (2, width // 2)).transpose(1, 2)


class Attention(nn.Module):
    """timm's shape: a switch on every module, torch's function found in torch.nn.functional."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.head_dim = width // 2
        self.fused_attn = True
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = (heads(t, x.shape[-1]) for t in self.qkv(x).chunk(3, -1))
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            x = self.attn_drop((q * self.head_dim**-0.5 @ k.mT).softmax(-1)) @ v
        return x.transpose(1, 2).flatten(2)


class QKVAttention(nn.Module):
    """openai-whisper's shape: a switch on the class, torch's function imported by name, in a method of its own."""

    use_sdpa = True

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, mask=None):
        return self.attend(*(heads(t, WIDTH) for t in self.qkv(x).chunk(3, -1)), mask=mask)

    def attend(self, q, k, v, *, mask=None):
        if QKVAttention.use_sdpa:
            out = scaled_dot_product_attention(q, k, v, is_causal=mask is not None)
        else:
            out = (q @ k.mT + (0 if mask is None else mask)).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


class OtherAttention(nn.Module):
    """torch's function, through no switch."""

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def calls(monkeypatch):
    """How often fastattn's function was called by a swapped module."""
    seen = []
    original = swap_peers.scaled_dot_product_attention
    swap_peers._on.cache_clear()
    swap_peers._class.cache_clear()
    monkeypatch.setattr(
        swap_peers, "scaled_dot_product_attention", lambda *a, **k: seen.append(k) or original(*a, **k)
    )
    yield seen
    swap_peers._on.cache_clear()
    swap_peers._class.cache_clear()


@pytest.mark.parametrize("cls", [Attention, QKVAttention])
def test_a_module_whose_switch_allows_it_is_swapped(cls, calls):
    model, x = nn.Sequential(cls(), nn.Linear(WIDTH, WIDTH)), torch.randn(2, 5, WIDTH)
    expected = model(x)
    before = dict(vars(model[0]))
    parameters = [id(p) for p in model.parameters()]
    assert fastattn.swap_attention(model).swapped == ("0",)
    assert isinstance(model[0], cls)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 1
    assert fastattn.swap_attention(model).already == ("0",)
    assert [id(p) for p in model.parameters()] == parameters
    assert fastattn.restore_attention(model) == ("0",)
    assert type(model[0]) is cls
    assert vars(model[0]) == before
    assert torch.equal(model(x), expected)
    assert len(calls) == 1
    assert fastattn.restore_attention(model) == ()


def test_the_backend_follows_the_last_call(calls):
    model, x = Attention(), torch.randn(2, 5, WIDTH)
    fastattn.swap_attention(model, backend="torch")
    model(x)
    fastattn.swap_attention(model)
    model(x)
    assert [call.get("backend") for call in calls] == ["torch", None]
    fastattn.restore_attention(model)
    assert type(model) is Attention


@pytest.mark.parametrize("cls", [Attention, QKVAttention])
def test_copies_and_pickles_stay_swapped(cls):
    model, x = cls(), torch.randn(2, 5, WIDTH)
    fastattn.swap_attention(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(x), model(x))
        assert fastattn.restore_attention(twin) == ("",)
        assert type(twin) is cls


def test_a_switch_that_is_off_is_left_with_what_helps(monkeypatch):
    monkeypatch.setattr(QKVAttention, "use_sdpa", False)
    model = nn.ModuleDict({"timm": Attention(), "whisper": QKVAttention(), "other": OtherAttention()})
    model["timm"].fused_attn = False
    report = fastattn.swap_attention(model)
    assert report.swapped == ()
    reasons = dict(report.left)
    assert "set its fused_attn = True before the swap" in reasons["timm"]
    assert "set QKVAttention.use_sdpa = True before the swap" in reasons["whisper"]
    assert "run it inside `with fastattn.sdpa_override():`" in reasons["other"]


def test_a_head_dim_that_the_op_cannot_run_is_left():
    model = Attention(1024)
    report = fastattn.swap_attention(model)
    assert report.swapped == ()
    assert "512" in report.left[0][1]


def test_a_class_changed_after_the_swap_is_respected():
    model = Attention()
    fastattn.swap_attention(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(ValueError, match="became a Wrapped"):
        fastattn.restore_attention(model)


def test_compiled_code_follows(calls):
    model, x = Attention(), torch.randn(2, 5, WIDTH)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    fastattn.swap_attention(model)
    swap_peers._on.cache_clear()
    torch.testing.assert_close(compiled(x), expected)
    fastattn.restore_attention(model)
    assert torch.equal(compiled(x), expected)


class Processor:
    _attention_backend = None

    def __init__(self):
        self._attention_backend = None


class OldProcessor:
    def __call__(self, attention, x):
        return F.scaled_dot_product_attention(x, x, x)


class ProcessedAttention(nn.Module):
    """diffusers' shape: a processor attends; scores are a method."""

    def __init__(self, processor):
        super().__init__()
        self.processor = processor

    def get_attention_scores(self, query, key):
        return (query @ key.mT).softmax(-1)

    def forward(self, x):
        return self.processor(self, x)


@pytest.fixture
def diffusers(monkeypatch):
    """A stand-in for diffusers' models and for fastattn's backend among its own."""

    class ModelMixin(nn.Module):
        def set_attention_backend(self, backend):
            if backend not in registered:
                raise ValueError(f"backend={backend!r} must be one of the following: native")
            for module in self.modules():
                if hasattr(getattr(module, "processor", None), "_attention_backend"):
                    module.processor._attention_backend = types.SimpleNamespace(value=backend)

    registered = set()
    library = types.ModuleType("diffusers.models.modeling_utils")
    library.ModelMixin = ModelMixin
    integration = types.ModuleType("fastattn.integrations.diffusers")
    integration.register = lambda: registered.update(("fastattn", "fastattn_torch"))
    monkeypatch.setitem(sys.modules, "diffusers.models.modeling_utils", library)
    monkeypatch.setitem(sys.modules, "fastattn.integrations.diffusers", integration)
    return types.SimpleNamespace(ModelMixin=ModelMixin, registered=registered)


class Transformer:
    """A model of a stand-in's class, with an attention that dispatches, an older one and one whose heads are wide."""

    def __new__(cls, diffusers):
        model = diffusers.ModelMixin()
        model.new = ProcessedAttention(Processor())
        model.old = ProcessedAttention(OldProcessor())
        model.wide = ProcessedAttention(Processor())
        model.wide.inner_dim, model.wide.heads = 1024, 2
        return model


def backend_of(attention):
    backend = attention.processor._attention_backend
    return getattr(backend, "value", backend)


def test_a_diffusers_model_gets_the_backend(diffusers):
    model = nn.ModuleList([Transformer(diffusers)])
    report = fastattn.swap_attention(model)
    assert report.swapped == ("0.new",)
    assert backend_of(model[0].new) == "fastattn"
    assert backend_of(model[0].wide) is None
    reasons = dict(report.left)
    assert "sdpa_override" in reasons["0.old"]
    assert "head dim 512" in reasons["0.wide"]
    assert fastattn.swap_attention(model, backend="torch").already == ("0.new",)
    assert backend_of(model[0].new) == "fastattn_torch"
    assert fastattn.restore_attention(model) == ("0.new",)
    assert backend_of(model[0].new) is None
    assert "_fastattn_processors" not in vars(model[0])
    assert fastattn.restore_attention(model) == ()


def test_a_backend_that_its_user_chose_stays(diffusers):
    model = Transformer(diffusers)
    diffusers.registered.add("fastattn")
    model.set_attention_backend("fastattn")
    assert fastattn.swap_attention(model, backend="torch").already == ("new",)
    assert backend_of(model.new) == "fastattn"
    assert fastattn.restore_attention(model) == ()
    assert backend_of(model.new) == "fastattn"


def test_without_a_diffusers_backend_its_models_are_left(diffusers, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastattn.integrations.diffusers", None)
    assert "cannot be set" in dict(fastattn.swap_attention(Transformer(diffusers)).left)["new"]


def test_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert fastattn.swap_attention(model).swapped == ("blocks.0.attn", "blocks.1.attn")
    torch.testing.assert_close(model(x), expected)
    fastattn.restore_attention(model)
    assert torch.equal(model(x), expected)


def test_whisper():
    whisper = pytest.importorskip("whisper")
    sizes = whisper.model.ModelDimensions(8, 8, 32, 4, 1, 100, 16, 32, 4, 1)
    model = whisper.model.Whisper(sizes).eval()
    mel, tokens = torch.randn(1, 8, 16), torch.randint(0, 100, (1, 5))
    expected = model(mel, tokens)
    assert len(fastattn.swap_attention(model).swapped) == 3
    torch.testing.assert_close(model(mel, tokens), expected)
