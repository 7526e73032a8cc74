"""What swap_attention leaves as it is, and the reason that it reports."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastattn.integrations.swap import restore_attention, swap_attention
from fastattn.nn.attention import MultiHeadAttention

EMBED = 16


class TwiceAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class SomeAttention(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_is_reported_with_the_reason():
    model = nn.ModuleDict(
        {
            "subclass": TwiceAttention(EMBED, 4),
            "other": SomeAttention(),
            "scripted": torch.jit.script(nn.MultiheadAttention(EMBED, 4)),
            "replaced": nn.MultiheadAttention(EMBED, 4),
            "ours": MultiHeadAttention(EMBED, 4, window=(3, 0)),
            "torchs": nn.MultiheadAttention(EMBED, 4),
            "linear": nn.Linear(2, 2),
        }
    )
    model["replaced"].forward = lambda *args, **kwargs: None
    report = swap_attention(model, backend="torch")
    assert report.swapped == ("torchs",)
    assert report.already == ("ours",)
    assert model["ours"].backend == "auto"
    reasons = dict(report.left)
    assert {
        name: next(w for w in ("subclass", "not a", "TorchScript", "replaced") if w in why)
        for name, why in reasons.items()
    } == {
        "subclass": "subclass",
        "other": "not a",
        "scripted": "TorchScript",
        "replaced": "replaced",
    }
    text = str(report)
    assert "swapped 1 module" in text
    assert "torchs" in text
    assert all(name in text and why in text for name, why in report.left)
    assert report.to_dict()["left"] == reasons
    assert restore_attention(model) == ("torchs",)
    assert model["ours"].window == (3, 0)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_class_changed_by_others_is_respected():
    """torch.nn.utils.parametrize gives a module a class of its own, before a swap or after it."""
    model = nn.ModuleList(nn.MultiheadAttention(EMBED, 4, batch_first=True) for _ in range(2))
    x = torch.randn(2, 3, EMBED)
    parametrize.register_parametrization(model[0], "in_proj_weight", Doubled())
    report = swap_attention(model)
    assert report.swapped == ("1",)
    assert report.left[0][0] == "0"
    assert "swap before parametrizing" in report.left[0][1]
    expected = model[1](x, x, x)
    parametrize.register_parametrization(model[1], "in_proj_weight", Doubled())
    assert not torch.allclose(model[1](x, x, x)[0], expected[0])
    with pytest.raises(ValueError, match="became a Parametrized"):
        restore_attention(model)
    parametrize.remove_parametrizations(model[1], "in_proj_weight", leave_parametrized=False)
    torch.testing.assert_close(model[1](x, x, x), expected)
    assert restore_attention(model) == ("1",)
    torch.testing.assert_close(model[1](x, x, x), expected)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda: nn.MultiheadAttention(512, 1), "head dim is 512"),
        (lambda: nn.MultiheadAttention(EMBED, 4, dropout=1.0), "dropout is 1.0"),
        (lambda: nn.MultiheadAttention(EMBED, 4).to(torch.complex64), "weights are torch.complex64"),
        (lambda: nn.MultiheadAttention(EMBED, 4).to(torch.float8_e4m3fn), "weights are torch.float8_e4m3fn"),
        (lambda: nn.MultiheadAttention(512, 1, kdim=3, vdim=4, add_bias_kv=True), "head dim is 512"),
    ],
)
def test_what_the_op_cannot_run_is_left(module, why):
    model = nn.ModuleList([module(), nn.MultiheadAttention(512, 2)])
    report = swap_attention(model)
    assert report.swapped == ("1",)
    assert [name for name, _ in report.left] == ["0"]
    assert why in report.left[0][1]
    assert type(model[0]) is nn.MultiheadAttention
    assert restore_attention(model) == ("1",)


def test_what_is_left_still_runs():
    module, x = nn.MultiheadAttention(512, 1, batch_first=True), torch.randn(1, 3, 512)
    expected = module(x, x, x)[0]
    swap_attention(module)
    assert torch.equal(module(x, x, x)[0], expected)


class AttentionNorm(nn.LayerNorm):
    pass


class AttentionDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = 0.1

    def forward(self, x):
        return nn.functional.dropout(x, self.p, self.training)


class AttentionBlock(nn.Module):
    """Holds attention, and computes none."""

    def __init__(self):
        super().__init__()
        self.norm = AttentionNorm(EMBED)
        self.attention = nn.MultiheadAttention(EMBED, 4, batch_first=True)
        self.dropout = AttentionDropout()

    def forward(self, x):
        x = self.norm(x)
        return self.dropout(self.attention(x, x, x)[0])


def test_modules_that_compute_no_attention_are_not_listed():
    model = nn.ModuleList([AttentionBlock(), AttentionNorm(EMBED), AttentionDropout()])
    report = swap_attention(model)
    assert report.swapped == ("0.attention",)
    assert report.left == ()


@pytest.fixture
def one_process():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_attention_is_left_with_the_right_reason(one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = nn.ModuleList(nn.MultiheadAttention(EMBED, 4, batch_first=True) for _ in range(2))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    swap_attention(model[1])
    for module in model:
        fsdp.fully_shard(module, mesh=mesh)
    report = swap_attention(model)
    assert report.swapped == ()
    assert "sharded by fully_shard" in dict(report.left)["0"]
    assert "swap before sharding" in dict(report.left)["0"]
    assert report.already == ("1",)
