"""GPT: what transformers' GPT-2 computes, the same with every option, padding, packing and the cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from gpt2_names import from_gpt2_names
from small_models import GPT2, KINDS, VOCAB
from small_models import make_gpt as make

from fastattn.models import GPT, GPTConfig
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.kv_cache import KVCache

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
    torch.testing.assert_close(actual.loss.float(), expected.loss, rtol=1e-6, atol=0)  # theirs is in float32
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
    return from_gpt2_names(theirs.state_dict())


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


@pytest.mark.parametrize("post_norm", [False, True], ids=["gpt2", "bert"])
def test_initialisation_is_gpt2s_or_berts(post_norm):
    """BERT normalises every sum, so that what is added to it need not be small."""
    model = GPT(
        GPTConfig(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=4, post_norm=post_norm)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "mlp.c_proj.weight"))
            std = 0.02 / (4 if residual and not post_norm else 1)  # sqrt(2 * 8)
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


def test_compiles_without_breaks():
    model = make(torch.float32, positions="rotary", n_layer=1)
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


def of_float16(cache, model):
    cache[1] = KVCache(2, 4, 9, 8, dtype=torch.float16)


def of_less_room(cache, model):
    cache[1] = KVCache(2, 4, 4, 8, dtype=torch.float64)


def of_a_layer_that_trains(cache, model):
    model.requires_grad_(False)
    model.h[1].requires_grad_()


@pytest.mark.parametrize("differs", [of_float16, of_less_room, of_a_layer_that_trains])
def test_a_layer_that_refuses_leaves_the_lengths_of_all_caches(differs):
    model, tokens = make(), ids(2, 5)
    cache = model.new_cache(2, 9)
    differs(cache, model)
    held = 2
    for layer in cache:
        layer.append(*torch.randn(2, *layer.keys.shape[:2], held, layer.keys.shape[3]).unbind())
    with pytest.raises((TypeError, ValueError), match="cache"):
        model(tokens, cache=cache)
    assert [layer.length for layer in cache] == [held] * len(cache)


def with_an_offset():
    """RoBERTa's kind of decoder, which gives padding tokens, here id 1, no positions."""
    return GPT(GPTConfig(**GPT2, position_offset=2, pad_token_id=1)).eval()


def test_padding_tokens_within_a_sequence_are_counted_alike_by_every_call():
    model = with_an_offset()
    tokens = torch.randint(2, VOCAB, (2, 12))
    tokens[:, 3] = tokens[1, 0] = 1
    expected = model(tokens).logits
    masked = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    packed = model(tokens.view(1, -1), segment_ids=torch.arange(2).repeat_interleave(12)[None]).logits
    torch.testing.assert_close(masked, expected)
    torch.testing.assert_close(packed.view_as(expected), expected)
    torch.testing.assert_close(model.decoder(2, 12).logits(tokens), expected)
    for chunk_size in (None, 1, 4, 5):
        decoder = model.decoder(2, 12)
        torch.testing.assert_close(decoder.prefill(tokens, chunk_size=chunk_size), expected[:, -1])
    decoder = model.decoder(2, 12)
    ends = torch.tensor([5, 12])  # few enough for reading the tokens alone
    read = decoder.prefill(tokens, ends)
    torch.testing.assert_close(read, expected[torch.arange(2), ends - 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_position_offset_moves_rows_of_the_table(side):
    """RoBERTa's: the rows before it are of padding, and a model with the same rows from 0 on gives the same."""
    pad, offset = 1, 2
    plain = make()
    sizes = {**GPT2, "n_positions": GPT2["n_positions"] + offset}
    moved = (
        GPT(GPTConfig(**sizes, position_offset=offset, pad_token_id=pad)).to(plain.wte.weight.dtype).eval()
    )
    assert moved.max_positions == plain.max_positions
    assert moved.wpe.padding_idx == offset - 1
    state = plain.state_dict()
    state["wpe.weight"] = torch.cat((torch.randn_like(state["wpe.weight"][:offset]), state["wpe.weight"]))
    moved.load_state_dict(state)
    tokens = torch.randint(2, VOCAB, (2, 9))
    real = torch.arange(9) < torch.tensor([[9], [6]])
    real = real.flip(1) if side == "left" else real
    tokens = tokens.masked_fill(~real, pad)
    for options in ({"attention_mask": real}, {"segment_ids": real.int() - 1}):
        expected, actual = plain(tokens, **options).logits, moved(tokens, **options).logits
        torch.testing.assert_close(actual[real], expected[real])

    def without_padding(_, scores):
        return scores.index_fill(1, torch.tensor([pad]), -math.inf)

    options = {"max_new_tokens": 6, "logits_processor": without_padding}
    assert torch.equal(moved.generate(tokens, real, **options), plain.generate(tokens, real, **options))
    with pytest.raises(ValueError, match=r"n_positions=66 - position_offset=2"):
        moved(torch.full((1, 65), 5))
    with pytest.raises(ValueError, match=r"position_offset: got 2, needs positions='learned'"):
        GPTConfig(**{**GPT2, "positions": "rotary"}, position_offset=2)
