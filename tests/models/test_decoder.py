"""GPT: what transformers' GPT-2 computes, the same with every option, padding, packing and the cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import GPT2, KINDS, VOCAB
from small_models import make_gpt as make

from fastattn.models import GPT, GPTConfig
from fastattn.nn.attention import MultiHeadAttention
from numerics import assert_within_rule

every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def ids(*shape):
    return torch.randint(0, VOCAB, shape)


def test_logits_loss_and_gradients_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **GPT2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2
    )
    theirs = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").double().eval()
    ours = make()
    ours.load_state_dict(state_of(theirs))
    tokens = ids(3, 17)
    labels = tokens.clone()
    labels[0, :6] = -100
    expected, actual = theirs(tokens, labels=labels), ours(tokens, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)  # theirs is computed in float32
    hidden = theirs.transformer(tokens).last_hidden_state
    torch.testing.assert_close(actual.last_hidden_state, hidden)
    expected.logits.square().mean().backward()
    actual.logits.square().mean().backward()
    torch.testing.assert_close(ours.wte.weight.grad, theirs.transformer.wte.weight.grad)
    torch.testing.assert_close(ours.wpe.weight.grad, theirs.transformer.wpe.weight.grad)
    for mine, other in zip(ours.h, theirs.transformer.h):
        torch.testing.assert_close(mine.attn.in_proj_weight.grad, other.attn.c_attn.weight.grad.T)
        torch.testing.assert_close(mine.mlp.c_proj.weight.grad, other.mlp.c_proj.weight.grad.T)
        torch.testing.assert_close(mine.ln_1.weight.grad, other.ln_1.weight.grad)


def state_of(theirs):
    from fastattn.models.checkpoint import from_gpt2_names

    return from_gpt2_names(theirs.state_dict(), tied=True)


def by_hand(model, tokens):
    """The forward pass written out with plain torch operations and explicit scores, float64."""
    config, w = model.config, model.state_dict()
    heads, kv_heads, dim, width = config.n_head, config.kv_heads, config.head_dim, config.n_embd
    length = tokens.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)

    def norm(x, name):
        weight = w[f"{name}.weight"]
        if config.norm == "layernorm":
            return F.layer_norm(x, (width,), weight, w.get(f"{name}.bias"), config.layer_norm_epsilon)
        x = x * (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon) ** -0.5
        return x * (weight + 1 if config.norm_unit_offset else weight)

    def head_norm(x, name):
        return norm(x, name) if config.norm == "rmsnorm" else F.rms_norm(x, (dim,), w[f"{name}.weight"])

    def project(x, name):
        return F.linear(x, w[f"{name}weight"], w.get(f"{name}bias"))

    def rotate(t, local):
        base = config.rope_local_base_freq if local else config.rope_theta
        stretch = config.rope_scaling["factor"] if config.rope_scaling and not local else 1
        angles = torch.arange(length)[:, None] / stretch * base ** (-torch.arange(0, dim, 2).double() / dim)
        z = torch.complex(t[..., : dim // 2], t[..., dim // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((z.real, z.imag), dim=-1)

    def cap(x, limit):
        return x if limit is None else limit * torch.tanh(x / limit)

    x = w["wte.weight"][tokens]
    if config.scale_embedding:
        x = x * width**0.5
    if config.positions == "learned":
        x = x + w["wpe.weight"][:length]
    if config.positions == "sinusoidal":
        for p in range(length):
            for d in range(width):
                angle = p / 10000 ** (d // 2 * 2 / width)
                x[:, p, d] += math.cos(angle) if d % 2 else math.sin(angle)
    for i in range(config.n_layer):
        p = f"h.{i}."
        sliding = config.window and (config.layer_types is None or "sliding" in config.layer_types[i])
        hidden = (distance < 0) | (distance >= (config.window if sliding else length))
        packed = project(norm(x, p + "ln_1"), p + "attn.in_proj_")
        q, k, v = packed.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
        if config.qk_norm:
            q, k = head_norm(q, p + "attn.q_norm"), head_norm(k, p + "attn.k_norm")
        if config.positions == "rotary":
            local = sliding and config.rope_local_base_freq is not None
            q, k = rotate(q, local), rotate(k, local)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = cap(q @ k.mT / math.sqrt(config.query_pre_attn_scalar or dim), config.attn_logit_softcapping)
        if config.positions == "alibi":
            slopes = torch.tensor([2.0 ** (-8 * (n + 1) / heads) for n in range(heads)], dtype=torch.float64)
            scores = scores - slopes[:, None, None] * distance
        h = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        h = project(h.transpose(1, 2).flatten(-2), p + "attn.out_proj.")
        x = x + (norm(h, p + "ln_1_out") if config.sandwich_norms else h)
        h = project(norm(x, p + "ln_2"), p + "mlp.c_fc.")
        gate, rest = h.chunk(2, dim=-1) if config.gated_mlp else (h, 1)
        h = F.silu(gate) if config.activation_function == "silu" else F.gelu(gate, approximate="tanh")
        h = project(h * rest, p + "mlp.c_proj.")
        x = x + (norm(h, p + "ln_2_out") if config.sandwich_norms else h)
    return cap(norm(x, "ln_f") @ w["lm_head.weight"].T, config.final_logit_softcapping)


@every_kind
def test_every_option_computes_what_it_says(options):
    model = make(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    tokens = ids(2, 13)
    torch.testing.assert_close(model(tokens).logits, by_hand(model, tokens), rtol=1e-8, atol=1e-9)


@every_kind
def test_padding_on_either_side_changes_no_real_token(options):
    model = make(**options)
    tokens = ids(2, 9)
    expected = model(tokens, labels=tokens)
    padded, labels = torch.full((2, 14), 3), torch.full((2, 14), -100)
    mask = torch.zeros(2, 14, dtype=torch.int64)
    for row, start in ((0, 5), (1, 0)):
        part = slice(start, start + 9)
        padded[row, part] = labels[row, part] = tokens[row]
        labels[row, start] = -100  # a first token is nobody's target; padding would predict this one
        mask[row, part] = 1
    out = model(padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(torch.stack((out.logits[0, 5:], out.logits[1, :9])), expected.logits)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(
        model(padded[:1], attention_mask=mask[:1].bool()).logits[0, 5:], expected.logits[0]
    )


@every_kind
def test_packed_documents_are_as_if_alone(options):
    model = make(**options)
    lengths = (4, 1, 7)
    documents = [ids(1, n) for n in lengths]
    packed = torch.cat([*documents, torch.full((1, 2), 3)], dim=1)
    segments = torch.tensor(
        [[0] * 4 + [1] + [0] * 7 + [-1] * 2]
    )  # an id may come back: runs are documents' only use
    segments[0, 5:12] = 7
    out = model(packed, labels=packed, segment_ids=segments)
    alone = [model(d, labels=d) for d in documents]
    torch.testing.assert_close(out.logits[:, :12], torch.cat([o.logits for o in alone], dim=1))
    expected = (3 * alone[0].loss + 6 * alone[2].loss) / 9  # 4 tokens have 3 targets, one has none
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    masked = model(packed, labels=packed, segment_ids=segments.clamp(min=0), attention_mask=segments >= 0)
    torch.testing.assert_close(masked.logits[:, :12], out.logits[:, :12])


@every_kind
def test_the_cache_changes_nothing(options):
    model = make(**options)
    tokens = ids(2, 15)
    whole = model(tokens).logits
    cache = model.new_cache(2, 15)
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in tokens.split([6, 1, 1, 4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@every_kind
@pytest.mark.parametrize("step", [1, 3])
def test_the_cache_with_left_padding(options, step):
    model = make(**options)
    tokens = ids(2, 15)
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, :4] = 0
    whole = model(tokens, attention_mask=mask).logits
    cache = model.new_cache(2, 15)
    with torch.no_grad():
        parts = [
            model(tokens[:, start : start + step], attention_mask=mask[:, : start + step], cache=cache).logits
            for start in range(0, 15, step)
        ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real])


def test_logits_to_keep_and_position_ids():
    model = make()
    tokens = ids(2, 8)
    whole = model(tokens)
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert whole.loss is None
    torch.testing.assert_close(model(tokens, position_ids=torch.arange(8)).logits, whole.logits)
    shifted = model(tokens, position_ids=torch.arange(8) + 5).logits
    assert not torch.allclose(shifted, whole.logits)
    rotary = make(positions="rotary")  # sees differences of positions only
    torch.testing.assert_close(rotary(tokens, position_ids=torch.arange(8) + 5).logits, rotary(tokens).logits)


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
    assert lean.loss.dtype == whole.loss.dtype == torch.float32
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


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "mlp.c_proj.weight"))
            std = 0.02 / (4 if residual else 1)  # sqrt(2 * 8)
            assert parameter.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * parameter.numel())), (
                name
            )
            assert abs(parameter.mean().item()) < 6 * std / math.sqrt(parameter.numel()), name
    assert model.lm_head.weight is model.wte.weight
    assert (
        sum(p.numel() for p in GPT(GPTConfig.preset("nano")).parameters())
        == 4096 * 128 + 256 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    )


def test_gpt2_preset_has_gpt2s_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2"))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


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


def test_compiles_without_breaks():
    model = make(torch.float32, positions="rotary")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    model.train()
    tokens = ids(2, 9)
    out = compiled(tokens, labels=tokens)
    out.loss.backward()
    grads, model.wte.weight.grad = model.wte.weight.grad, None
    model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(grads, model.wte.weight.grad)
    model.eval()
    for length in (7, 12):
        tokens = ids(2, length)
        expected, actual = model(tokens, labels=tokens), compiled(tokens, labels=tokens)
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("kind", ["learned", "gemma"])
def test_exports(kind):
    model = make(torch.float32, **KINDS[kind])
    tokens = ids(1, 7)
    program = torch.export.export(model, (tokens,))
    torch.testing.assert_close(program.module()(tokens).logits, model(tokens).logits)


def test_attention_is_the_librarys():
    assert all(isinstance(block.attn, MultiHeadAttention) for block in make().h)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m(ids(9)), "input_ids"),
        (lambda m: m(torch.rand(1, 9)), "input_ids"),
        (lambda m: m(ids(1, 65)), "n_positions"),
        (lambda m: m(ids(1, 9), attention_mask=torch.ones(1, 8)), "attention_mask"),
        (lambda m: m(ids(1, 9), labels=ids(1, 8)), "labels"),
        (lambda m: m(ids(1, 9), segment_ids=ids(9)), "segment_ids"),
        (lambda m: m(ids(1, 9), labels=ids(1, 9), logits_to_keep=1), "logits_to_keep"),
        (lambda m: m(ids(1, 9), position_ids=torch.arange(8)), "position_ids"),
        (lambda m: m(ids(1, 9), logits_to_keep=-1), "logits_to_keep"),
        (lambda m: m(ids(2, 9), cache=m.new_cache(1, 9)), "cache"),
        (lambda m: m(ids(1, 9), cache=m.new_cache(1, 9)[:1]), "cache"),
        (lambda m: m(ids(1, 9), cache=m.new_cache(1, 8)), "cache"),
        (lambda m: m(ids(1, 9), labels=torch.rand(1, 9)), "labels"),
        (lambda m: m(ids(1, 9) + 61), "vocab_size"),
        (lambda m: m(ids(1, 9) - 61), "vocab_size"),
        (lambda m: m(ids(1, 9), position_ids=torch.arange(9) + 60), "position_ids"),
        (lambda m: m(ids(1, 9), cache=[]), "cache"),
    ],
)
def test_bad_calls_are_refused_by_name(call, name):
    model = make()
    with torch.no_grad(), pytest.raises(ValueError, match=name):
        call(model)
