"""swap_attention exchanges the class in place and restore_attention gives back exactly what was there."""

import copy
import io

import pytest
import torch
from torch import nn

from fastattn.integrations.swap import SwapReport, restore_attention, swap_attention
from fastattn.nn.attention import MultiHeadAttention

EMBED = 16


class Model(nn.Module):
    """An encoder-decoder, an attention of its own, one attention used twice and one kept outside the module tree."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(
            EMBED,
            4,
            num_encoder_layers=2,
            num_decoder_layers=1,
            dim_feedforward=24,
            dropout=0.1,
            batch_first=True,
        )
        self.wide = nn.MultiheadAttention(EMBED, 2, kdim=6, vdim=5, add_bias_kv=True, add_zero_attn=True)
        self.first = nn.MultiheadAttention(EMBED, 4, batch_first=True)
        self.second = self.first
        self.hidden = [self.first]

    def forward(self, src, tgt):
        x = self.transformer(src, tgt)
        x = x + self.first(x, x, x)[0] + self.second(x, x, x, need_weights=False)[0]
        memory = x.transpose(0, 1)
        return x + self.wide(memory, memory[..., :6], memory[..., :5])[0].transpose(0, 1)


ATTENTIONS = {
    "transformer.encoder.layers.0.self_attn",
    "transformer.encoder.layers.1.self_attn",
    "transformer.decoder.layers.0.self_attn",
    "transformer.decoder.layers.0.multihead_attn",
    "wide",
    "first",
}


def example():
    model = Model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    data = (torch.randn(2, 5, EMBED, dtype=torch.float64), torch.randn(2, 4, EMBED, dtype=torch.float64))
    return model, data


def snapshot(model):
    """Everything a module holds, by identity for tensors and by value for plain attributes."""
    seen = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") or k == "_qkv_same_embed_dim"}
        seen[name] = {
            "module": id(module),
            "class": type(module),
            "keys": list(vars(module)),
            "plain": {k: repr(v) for k, v in plain.items()},
            "parameters": {k: id(v) for k, v in module._parameters.items()},
            "buffers": {k: id(v) for k, v in module._buffers.items()},
            "modules": list(module._modules),
            "hooks": {
                k: list(v.items())
                for k, v in vars(module).items()
                if k.endswith(("hooks", "hooks_with_kwargs"))
            },
            "kinds": {
                k: (p.dtype, p.device, p.requires_grad)
                for k, p in module._parameters.items()
                if p is not None
            },
        }
    return seen


def loss_and_grads(model, data):
    out = model(*data)
    grads = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    return out, grads


def test_swaps_everything_and_changes_nothing_but_the_kernel():
    model, data = example()
    model.eval()
    expected = loss_and_grads(model, data)
    report = swap_attention(model)
    assert set(report.swapped) == ATTENTIONS
    assert report.already == report.left == ()
    assert all(type(model.get_submodule(name)) is MultiHeadAttention for name in ATTENTIONS)
    assert not any(type(m) is nn.MultiheadAttention for m in model.modules())
    actual = loss_and_grads(model, data)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(*data), expected[0])


def test_swapped_modules_are_called_in_eval(monkeypatch):
    model, data = example()
    swap_attention(model)
    called = []
    forward = MultiHeadAttention.forward
    monkeypatch.setattr(
        MultiHeadAttention, "forward", lambda m, *a, **k: called.append(m) or forward(m, *a, **k)
    )
    with torch.no_grad():
        model.eval()(*data)
    assert {id(m) for m in called} == {id(model.get_submodule(name)) for name in ATTENTIONS}
    assert len(called) == len(ATTENTIONS) + 1  # first is second, too


def test_restore_is_exact():
    model, data = example()
    model.first.register_forward_hook(lambda *_: None)
    model.wide.register_forward_pre_hook(lambda *_: None)
    model.wide.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    model.first.register_full_backward_hook(lambda *_: None)
    model.first.register_state_dict_pre_hook(lambda *_: None)
    model.wide.in_proj_bias.requires_grad_(False)
    model.transformer.eval()
    model.transformer.decoder.to("meta").bfloat16()
    before, weights = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    swap_attention(model)
    assert snapshot(model) != before
    assert list(model.state_dict()) == list(weights)
    assert set(restore_attention(model)) == ATTENTIONS
    assert snapshot(model) == before
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items() if not v.is_meta)
    model.transformer.encoder(data[0])
    assert restore_attention(model) == ()
    assert snapshot(model) == before


def test_references_outside_the_tree_see_the_swap():
    model, _ = example()
    first = model.first
    swap_attention(model)
    assert model.hidden[0] is first is model.second
    assert isinstance(first, MultiHeadAttention)


def test_idempotent_and_the_backend_follows_the_last_call():
    model, _ = example()
    swap_attention(model)
    once = snapshot(model)
    report = swap_attention(model)
    assert report.swapped == ()
    assert set(report.already) == ATTENTIONS
    assert snapshot(model) == once
    swap_attention(model, backend="torch")
    assert all(model.get_submodule(name).backend == "torch" for name in ATTENTIONS)


def test_hooks_mode_dtype_and_frozen_parameters_stay():
    model, data = example()
    calls = []
    model.first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.first.register_forward_hook(lambda *_: calls.append("post"))
    model.first.out_proj.weight.requires_grad_(False)
    model.first.eval()
    identities = {name: id(p) for name, p in model.named_parameters()}
    swap_attention(model)
    model(*data)
    assert calls == ["pre", "post"] * 2
    assert not model.first.training
    assert model.wide.training
    assert not model.first.out_proj.weight.requires_grad
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert model.first.in_proj_weight.dtype == torch.float64


def test_an_optimizer_goes_on_and_a_run_half_swapped_is_the_same_run():
    finals = []
    for swapped_at in (None, 0, 3):
        torch.manual_seed(1)
        model, data = example()
        model.eval()  # without dropout, whose masks differ
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(8):
            if step == swapped_at:
                swap_attention(model)
            if step == 5:
                restore_attention(model)
            optimizer.zero_grad()
            loss = model(*data).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        finals.append(losses)
    assert finals[1] == pytest.approx(finals[0], rel=1e-7)
    assert finals[2] == pytest.approx(finals[0], rel=1e-7)


def test_moves_and_casts_between_swap_and_restore_are_kept():
    model, _ = example()
    swap_attention(model)
    model.float().train()
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    restore_attention(model)
    assert all(p.dtype == torch.float32 and (p == 0).all() for p in model.parameters())


def test_a_swapped_model_can_be_copied_and_saved():
    model, data = example()
    swap_attention(model.eval())
    expected = model(*data)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(*data), expected)
        assert set(restore_attention(twin)) == ATTENTIONS
        assert type(twin.first) is nn.MultiheadAttention
        torch.testing.assert_close(twin(*data), expected)
    assert type(model.first) is MultiHeadAttention


def test_the_model_itself_may_be_the_attention():
    module = nn.MultiheadAttention(EMBED, 4)
    assert swap_attention(module).swapped == ("",)
    assert isinstance(module, MultiHeadAttention)
    assert restore_attention(module) == ("",)
    assert type(module) is nn.MultiheadAttention


def test_bad_arguments():
    model = nn.MultiheadAttention(EMBED, 4)
    with pytest.raises(ValueError, match="backend"):
        swap_attention(model, backend="nope")
    assert type(model) is nn.MultiheadAttention
    with pytest.raises(TypeError, match="model"):
        swap_attention("model")
    with pytest.raises(TypeError, match="model"):
        restore_attention(None)


def test_an_empty_report_prints():
    assert str(swap_attention(nn.Linear(2, 2))) == "swapped 0 modules to fastattn (backend='auto')"
    assert isinstance(swap_attention(nn.Linear(2, 2)), SwapReport)


def test_a_compiled_model_notices_the_swap(monkeypatch):
    module = nn.MultiheadAttention(EMBED, 4, batch_first=True)
    compiled = torch.compile(module, backend="eager")
    x = torch.randn(2, 3, EMBED)
    expected = compiled(x, x, x, need_weights=False)[0]
    assert swap_attention(compiled).swapped == ("_orig_mod",)
    seen = []
    monkeypatch.setattr(MultiHeadAttention, "_merge_heads", _noting(seen, MultiHeadAttention._merge_heads))
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
    assert seen
    restore_attention(compiled)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)


def _noting(seen, function):
    def noted(*args):
        seen.append(1)
        return function(*args)

    return noted
