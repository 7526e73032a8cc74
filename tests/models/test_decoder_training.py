"""GPT in training: the loss without logits, the gradients of tied weights, dropout, autocast, learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import GPT2, KINDS, VOCAB
from small_models import make_gpt as make

from fastattn.models import GPT, GPTConfig
from numerics import assert_within_rule

every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def ids(*shape):
    return torch.randint(0, VOCAB, shape)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_training_makes_the_loss_and_gradients_of_all_logits_without_them(options, autocast):
    model = make(torch.float32 if autocast else torch.float64, **options).train()
    tokens = ids(3, 9)
    labels = tokens.clone()
    labels[1, 4:] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lean, whole = (model(tokens, labels=labels, return_logits=keep) for keep in (None, True))
    assert lean.logits is None
    assert whole.logits is not None
    assert lean.loss.dtype == whole.loss.dtype == (torch.float32 if autocast else torch.float64)
    close = {"rtol": 0.05, "atol": 0.02} if autocast else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(lean.loss, whole.loss, **close)
    for a, b in zip(gradients(model, lean.loss), gradients(model, whole.loss)):
        torch.testing.assert_close(a, b, **close)


def test_the_loss_of_a_16_bit_model_is_not_rounded_to_its_dtype():
    model, tokens = make(torch.bfloat16).train(), ids(2, 9)
    loss, of_all_logits = (model(tokens, labels=tokens, return_logits=keep).loss for keep in (None, True))
    assert loss.dtype == torch.float32
    wide = make().train()
    wide.load_state_dict(model.state_dict())
    assert_within_rule(loss, of_all_logits, wide(tokens, labels=tokens).loss, dtype=torch.bfloat16)
    loss.backward()
    assert model.wte.weight.grad.dtype == torch.bfloat16


def untied(model):
    """The same model with two weights in the place of the shared one."""
    twin = GPT(GPTConfig(**{**GPT2, "tie_word_embeddings": False})).double().train(model.training)
    twin.load_state_dict({**model.state_dict(), "lm_head.weight": model.wte.weight.detach().clone()})
    return twin


WAYS = {  # what is differentiated, of which some leaves the head's or the embedding's gradient out
    "loss": lambda out: out.loss,
    "hidden": lambda out: out.last_hidden_state.square().mean(),
    "both": lambda out: out.loss + out.last_hidden_state.square().mean(),
}


@pytest.mark.parametrize("what", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("keep", [False, True])
def test_a_tied_weight_has_the_sum_of_both_gradients(what, keep):
    model, tokens = make().train(), ids(3, 9)
    twin = untied(model)
    theirs = what(twin(tokens, labels=tokens, return_logits=keep))
    pair = torch.autograd.grad(theirs, [twin.wte.weight, twin.lm_head.weight], allow_unused=True)
    expected = sum(grad for grad in pair if grad is not None)
    ours = what(model(tokens, labels=tokens, return_logits=keep))
    weight = model.wte.weight
    torch.autograd.grad(
        ours, [model.ln_f.weight], retain_graph=True
    )  # a run that the embedding has no part in
    for graph in (False, True, False):
        (actual,) = torch.autograd.grad(ours, [weight], retain_graph=True, create_graph=graph)
        torch.testing.assert_close(actual, expected)
    ours.backward()
    torch.testing.assert_close(weight.grad, expected)
    what(model(tokens, labels=tokens, return_logits=keep)).backward()  # added to what is there
    torch.testing.assert_close(weight.grad, 2 * expected)


def detached(module, args, out):
    return out.detach()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("cut", ["block", "dropout", "frozen", "input"])
def test_a_head_keeps_its_gradient_where_the_embedding_gets_none(cut, known, monkeypatch):
    """Hidden states may be detached from the embedding, or a gradient of the head's product alone be asked for."""
    if not known:
        monkeypatch.setattr("fastattn.torch_compat.state._will_execute", None)
    model, tokens = make().train(), ids(3, 9)
    twin = untied(model)
    for each in (model, twin):
        if cut in ("block", "dropout"):
            module = each.h[0] if cut == "block" else each.drop
            module.register_forward_hook(detached)
        if cut == "frozen":
            each.h[0].forward = torch.no_grad()(each.h[0].forward)
    for _ in range(2):
        losses = [each(tokens, labels=tokens).loss for each in (model, twin)]
        if cut == "input":
            for each, loss in zip((model, twin), losses):
                torch.autograd.grad(loss, [each.h[0].ln_1.weight], retain_graph=True)
        model.zero_grad()
        twin.zero_grad()
        for loss in losses:
            loss.backward()
        parts = [w.grad for w in (twin.wte.weight, twin.lm_head.weight) if w.grad is not None]
        assert len(parts) == (2 if cut == "input" else 1)
        torch.testing.assert_close(model.wte.weight.grad, sum(parts))


@pytest.mark.parametrize("tied", [False, True])
def test_a_padding_token_that_is_read_trains_its_embedding_or_not(tied):
    options = {"pad_token_id": 5, "tie_word_embeddings": tied}
    tokens = ids(2, 9).clamp(min=6)
    tokens[:, 3:5] = 5
    grads = []
    for trains in (True, False):
        model = make(**options, train_pad_embedding=trains).train()
        assert (model.wte.weight[5] == 0).all() != trains
        torch.nn.init.normal_(model.wte.weight, generator=torch.Generator().manual_seed(0))
        model(tokens, labels=tokens).loss.backward()
        grads.append(model.wte.weight.grad)
    others = torch.arange(VOCAB) != 5
    torch.testing.assert_close(grads[1][others], grads[0][others])
    assert not torch.equal(grads[1][5], grads[0][5])
    if not tied:
        assert (grads[1][5] == 0).all()


def test_a_run_after_an_unfinished_one_takes_nothing_of_it():
    model, tokens = make().train(), ids(3, 9)
    out = model(tokens, labels=tokens)
    expected = torch.autograd.grad(WAYS["hidden"](model(tokens)), [model.wte.weight])
    torch.autograd.grad(out.loss, [model.ln_f.weight], retain_graph=True)
    actual = torch.autograd.grad(WAYS["hidden"](out), [model.wte.weight])
    torch.testing.assert_close(actual, expected)


def test_a_training_step_makes_one_gradient_of_the_shared_weight(monkeypatch):
    sizes = {**GPT2, "vocab_size": 5000, "n_positions": 16, "initializer_range": 0.02}
    model = GPT(GPTConfig(**sizes)).train()
    tokens = torch.randint(0, 5000, (1, 8))
    seen = []
    monkeypatch.setattr(
        torch.Tensor,
        "new_zeros",
        lambda t, *a, _f=torch.Tensor.new_zeros, **k: seen.append(a) or _f(t, *a, **k),
    )
    model(tokens, labels=tokens).loss.backward()
    assert (model.wte.weight.shape,) not in seen  # the embedding found the head's gradient
    model(tokens).logits.sum().backward()
    model(tokens, labels=tokens).last_hidden_state.sum().backward()
    assert (model.wte.weight.shape,) in seen


class Scaled(torch.nn.Module):
    """A head of another kind, as adapters put one in its place."""

    def __init__(self, head):
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, x):
        return 2 * self.head(x)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_head_that_does_more_than_its_product_is_called(hooked):
    model, tokens = make().train(), ids(2, 9)
    if hooked:
        model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        model.lm_head = Scaled(model.lm_head)
    out = model(tokens, labels=tokens)
    logits = model.eval()(tokens).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    assert out.logits is None


def test_dropout_acts_in_training_only():
    model = make(dropout=0.4)
    tokens = ids(2, 9)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    torch.manual_seed(3)
    first = model(tokens).logits
    torch.manual_seed(3)
    assert torch.equal(model(tokens).logits, first)
    for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        single = make(**{name: 0.4}).train()
        assert not torch.equal(single(tokens).logits, single(tokens).logits), name


def test_it_learns():
    model = make(torch.float32, initializer_range=0.02).train()
    tokens = ids(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[-1] < 0.3 * losses[0]


def test_bfloat16_and_autocast():
    reference = make()
    tokens = ids(2, 9)
    exact = reference(tokens).logits
    half = make(torch.bfloat16)
    assert half(tokens).logits.dtype == torch.bfloat16
    assert (half(tokens).logits - exact).abs().mean() < 0.03 * exact.abs().mean()
    single = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = single(tokens, labels=tokens)
    assert out.loss.dtype == torch.float32
    assert (out.logits - exact).abs().mean() < 0.03 * exact.abs().mean()
