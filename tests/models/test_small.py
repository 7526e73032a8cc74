"""Smaller weights: 8-bit layers within their bound, bfloat16, and the figures of what they change."""

import json
import math

import pytest
import safetensors.torch
import torch
from small_models import BERT as SIZES
from small_models import GPT2

from fastattn.models import (
    GPT,
    BertConfig,
    BertForEmbedding,
    BertForMaskedLM,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    load,
)
from fastattn.models.encoder_decoder_config import bert_decoder
from fastattn.models.small import compare, perplexity, target_perplexity, weight_bytes
from fastattn.nn.int8 import Int8Linear, quantize_linears
from fastattn.nn.linear import Linear
from fastattn.nn.rows import INT8_ROWS, Int8Rows

BERT = {**SIZES, "hidden_size": 64, "initializer_range": 0.1}


def saved(cls, config, folder):
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    return folder


@pytest.fixture
def gpt(tmp_path):
    return saved(GPT, GPTConfig(**GPT2), tmp_path / "gpt")


@pytest.fixture
def bert(tmp_path):
    return saved(BertForEmbedding, BertConfig(**BERT), tmp_path / "bert")


def ids(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [0, 1, INT8_ROWS, 2 * INT8_ROWS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_products_are_within_their_bound_and_of_each_row_alone(count, dtype):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(count, 48).to(dtype),
        torch.randn(40, 48).to(dtype),
        torch.randn(40).to(dtype),
    )
    rows = Int8Rows(weight, bias)
    out = rows(x)
    assert out.shape == (count, 40)
    assert out.dtype == dtype
    assert all(torch.equal(rows(x[i : i + 1])[0], out[i]) for i in range(0, count, 100))
    wide, w = x.double(), weight.double()
    exact = wide @ w.T + bias.double()
    # half a level of each factor, times the largest of the other, for each of 48 products
    steps_x = wide.abs().amax(1, keepdim=True) / rows.levels / 2 if count else wide.new_zeros(0, 1)
    steps_w = w.abs().amax(1) / 127 / 2
    bound = 48 * (
        steps_x * w.abs().amax(1) + steps_w * (wide.abs().amax(1, keepdim=True) if count else steps_x)
    )
    bound = bound + 48 * steps_x * steps_w + torch.finfo(dtype).eps * exact.abs()
    assert bool(((out.double() - exact).abs() <= bound).all())


def test_8_bit_layers_round_in_eval_mode_only():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"0": Linear(48, 40), "head": Linear(48, 40)})
    layer, x = model["0"], torch.randint(-9, 10, (3, 5, 48)).float().requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-9, 10, (40, 48)))  # gradients of integers are exact
    exact = layer(x)
    dout = torch.randint_like(exact, -9, 10)
    expected = torch.autograd.grad(exact, (x, layer.weight, layer.bias), dout)
    assert quantize_linears(model, "int8") == 1
    assert type(model["head"]) is Linear
    assert torch.equal(layer(x), exact)  # in training mode
    model.eval()
    with_gradients = layer(x)
    gradients = torch.autograd.grad(with_gradients, (x, layer.weight, layer.bias), dout)
    assert all(map(torch.equal, gradients, expected))
    x = x.detach()
    assert torch.equal(layer(x), with_gradients)  # the weight alone requires a gradient
    with torch.no_grad():
        rounded = layer(x)
        assert torch.equal(rounded, with_gradients)
        assert not torch.equal(rounded, exact)
        layer.weight.mul_(2)  # the rounded copy follows the weight
        layer.bias.mul_(2)
        assert torch.equal(layer(x), 2 * rounded)
    assert quantize_linears(model, None) == 1
    assert type(layer) is Linear
    with pytest.raises(ValueError, match="kind: got 'int4'"):
        quantize_linears(model, "int4")


def test_loading_with_smaller_weights(gpt, bert):
    assert load(gpt, quantize="int8").quantized == "int8"
    model = load(bert, quantize="int8")
    assert isinstance(model, BertForEmbedding)
    assert sum(type(m) is Int8Linear for m in model.modules()) == 8
    assert not any(type(m) is Int8Linear for m in model.quantize(None).modules())
    assert load(bert, dtype="bfloat16").bert.layers[0].attn.qkv.weight.dtype == torch.bfloat16
    for call in (load, GPT.from_pretrained):
        with pytest.raises(ValueError, match="quantize: got 'int4', needs 'int8' or None"):
            call(gpt, quantize="int4")


def test_a_loaded_encoder_rounds_without_no_grad(bert):
    """Its embeddings require gradients, so that the input of every layer does."""
    small = load(bert, quantize="int8")
    out = small(ids(2, 7)).embeddings
    assert not torch.equal(out, load(bert)(ids(2, 7)).embeddings)
    with torch.no_grad():
        assert torch.equal(small(ids(2, 7)).embeddings, out)
    out.sum().backward()
    assert all(parameter.grad is not None for name, parameter in small.named_parameters() if "layers" in name)


def test_what_is_saved_is_not_rounded(bert, tmp_path):
    model = load(bert, quantize="int8")
    with torch.no_grad():
        model(ids(2, 7))
    model.save_pretrained(tmp_path / "again")
    state = load(bert).state_dict()
    assert all(torch.equal(state[name], t) for name, t in load(tmp_path / "again").state_dict().items())


@pytest.mark.parametrize("kind", ["gpt", "own", "llama", "bert"])
def test_8_bit_folders(kind, tmp_path, gpt, bert):
    if kind == "own":
        saved(GPT, GPTConfig(**GPT2, positions="rotary", num_kv_heads=2), tmp_path / "own")
    elif kind == "llama":
        entries = {**BERT, "num_key_value_heads": 2, "head_dim": 16, "model_type": "llama"}
        family = next(f for f in GPT.families if f.model_type == "llama")
        saved(GPT, family.read_config(entries), tmp_path / "llama")
    model = load(tmp_path / kind)
    model.save_pretrained(tmp_path / "small", quantize="int8")
    loaded = load(tmp_path / "small")
    assert (type(loaded), loaded.config, loaded.quantized) == (type(model), model.config, "int8")
    rounded = dict(loaded.named_parameters())
    layered = [
        n for n, p in model.named_parameters() if p.dim() == 2 and any(x.isdigit() for x in n.split("."))
    ]
    assert len(layered) == 8
    for name, parameter in model.named_parameters():
        steps = parameter.abs().amax(-1, keepdim=True) / 127
        if name in layered:
            assert bool(((rounded[name] - parameter).abs() <= steps * 0.501).all())
        else:
            assert torch.equal(rounded[name], parameter)
    before, after = ((tmp_path / k / "model.safetensors").stat().st_size for k in (kind, "small"))
    matrices = sum(rounded[name].numel() for name in layered)
    assert after < before - 2.5 * matrices
    loaded.save_pretrained(tmp_path / "again", quantize="int8")  # rounding what is rounded changes nothing
    first, second = (
        safetensors.torch.load_file(tmp_path / k / "model.safetensors") for k in ("small", "again")
    )
    assert all(torch.equal(first[n], t) for n, t in second.items() if t.dtype == torch.int8)
    tokens = ids(2, 9)
    if kind != "bert":
        assert torch.equal(
            loaded.generate(tokens, max_new_tokens=5), model.quantize().generate(tokens, max_new_tokens=5)
        )


def test_8_bit_folders_that_do_not_fit(gpt, tmp_path):
    load(gpt).save_pretrained(tmp_path / "small", quantize="int8")
    path = tmp_path / "small" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "transformer.h.0.mlp.c_fc.weight"
    other = {**tensors, "transformer.ln_f.weight_scale": torch.ones(1)}
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != f"{name}_scale"}, rf"{name} has no scale that fits it"),
        ({**tensors, f"{name}_scale": torch.ones(3, 1)}, rf"{name} has no scale that fits it"),
        (other, r"ln_f\.weight_scale belongs to no 8-bit tensor"),
    ):
        safetensors.torch.save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "small")
    entries = json.loads((gpt / "config.json").read_text())
    (gpt / "config.json").write_text(
        json.dumps({**entries, "quantization_config": {"quant_method": "other"}})
    )
    with pytest.raises(ValueError, match="quantization_config: got"):
        load(gpt)
    with pytest.raises(ValueError, match="quantize: got 'int4'"):
        GPT(GPTConfig(**GPT2)).save_pretrained(tmp_path / "never", quantize="int4")


def test_perplexity_is_that_of_the_formula(gpt):
    model, tokens = load(gpt, dtype="float64"), ids(3, 9)
    with torch.no_grad():
        logs = model(tokens).logits.double().log_softmax(-1)
    taken = logs[:, :-1].gather(-1, tokens[:, 1:, None])
    assert perplexity(model, tokens) == pytest.approx(math.exp(-taken.mean()), rel=1e-9)
    padded = torch.cat([torch.full((3, 4), 60), tokens], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 9)], dim=1)
    assert perplexity(model, padded, mask) == pytest.approx(perplexity(model, tokens), rel=1e-9)
    with pytest.raises(ValueError, match="input_ids: holds no sequence of two tokens"):
        perplexity(model, tokens[:, :1])


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_perplexity_before_and_after_is_printed(gpt, options, capsys):
    """The figures are those of the models' own logits, each sequence read by itself."""
    tokens = ids(4, 32)
    change = compare(gpt, tokens, **options)
    expected = []
    for model in (load(gpt), load(gpt, **options)):
        with torch.no_grad():
            logits = [model.decoder(1, 32).logits(row[None])[0, :-1] for row in tokens]
        losses = torch.nn.functional.cross_entropy(torch.cat(logits).double(), tokens[:, 1:].flatten())
        expected.append(losses.exp())
    torch.testing.assert_close(torch.tensor(change.perplexities).double(), torch.stack(expected))
    before, after = change.perplexities
    assert before != after
    name = next(iter(options.values()))
    assert capsys.readouterr().out == f"{change}\n"
    assert f"{name}: " in str(change)
    assert f"perplexity {before:.4f} -> {after:.4f}" in str(change)
    assert change.bytes_after < 0.7 * change.bytes_before


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": torch.bfloat16}])
def test_cosines_before_and_after_are_printed(bert, options, tmp_path, capsys):
    """The figures are the cosines of the vectors that the model before and the model after give."""
    lengths = [20, 7, 1, 13]
    tokens, mask = ids(4, 20), (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    lm = saved(BertForMaskedLM, BertConfig(**BERT), tmp_path / "lm")
    for folder in (bert, lm):
        change = compare(folder, tokens, mask, **options)
        vectors = []
        for model in (load(folder), load(folder, **options)):
            with torch.no_grad():
                if folder is bert:
                    vectors.append(model(tokens, mask).embeddings.double())
                else:  # the mean of the trunk's last hidden states
                    states = model.bert(tokens, mask).last_hidden_state.double()
                    vectors.append(states.sum(1) / torch.tensor(lengths)[:, None])
        cosines = torch.nn.functional.cosine_similarity(*vectors)
        expected = torch.stack((cosines.mean(), cosines.min()))
        torch.testing.assert_close(torch.tensor(change.cosines).double(), expected)
        mean, least = change.cosines
        assert least < mean < 1.0
        assert f"mean {mean:.6f}, least {least:.6f}" in capsys.readouterr().out


def test_bytes_and_bad_options(gpt, tmp_path):
    model = load(gpt)
    whole = sum(p.numel() for p in model.parameters()) * 4
    assert weight_bytes(model) == whole
    rounded = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("h."))
    outputs = sum(p.shape[0] for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("h."))
    assert weight_bytes(model.quantize("int8")) == whole - 3 * rounded + 4 * outputs
    with pytest.raises(ValueError, match="dtype, quantize: needs one"):
        compare(gpt, ids(1, 4))
    with pytest.raises(ValueError, match=r"labels: got targets, and .* is none"):
        compare(gpt, ids(1, 4), labels=ids(1, 4), dtype="bfloat16")
    folder = saved(EncoderDecoder, both_parts(), tmp_path / "both")
    with pytest.raises(ValueError, match=r"labels: got None, and .* is an encoder-decoder, needs targets"):
        compare(folder, ids(1, 4), dtype="bfloat16")
    for labels, message in (
        (ids(2, 4), r"needs integers of shape \(1, length\)"),
        (ids(1, 4) * 0 - 100, "no token"),
    ):
        with pytest.raises(ValueError, match=f"labels: .*{message}"):
            compare(folder, ids(1, 4), labels=labels, dtype="bfloat16")


def both_parts():
    encoder = BertConfig(**BERT)
    return EncoderDecoderConfig(encoder, bert_decoder(encoder), decoder_start_token_id=1, pad_token_id=0)


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "bfloat16"}])
def test_an_encoder_decoder_s_targets_before_and_after(options, tmp_path, capsys):
    """The perplexity of targets given their sources: forward's own at full size, and that of 8-bit steps."""
    folder = saved(EncoderDecoder, both_parts(), tmp_path / "both")
    source, labels = ids(3, 9), ids(3, 6)
    mask = torch.ones(3, 9).long()
    mask[1, 6:], labels[1, 4:] = 0, -100
    whole, wide = load(folder), load(folder, dtype="float64")
    with torch.no_grad():
        expected = wide(source, mask, labels=labels).loss.exp()
    found = target_perplexity(wide, source, labels, mask)
    torch.testing.assert_close(torch.tensor(found), expected.float())  # losses are float32
    change = compare(folder, source, mask, labels, **options)
    both = [target_perplexity(model, source, labels, mask) for model in (whole, load(folder, **options))]
    assert list(change.perplexities) == both
    assert both[0] != both[1]
    assert capsys.readouterr().out == f"{change}\n"
    matrices = [
        p
        for n, p in whole.named_parameters()
        if p.dim() == 2 and any(part.isdigit() for part in n.split("."))
    ]
    sizes = sum(p.numel() for p in matrices), sum(p.shape[0] for p in matrices)
    if "quantize" in options:
        assert change.bytes_after == change.bytes_before - 3 * sizes[0] + 4 * sizes[1]
    else:
        assert change.bytes_after * 2 == change.bytes_before
