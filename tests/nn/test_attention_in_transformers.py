"""MultiHeadAttention in torch's encoder and decoder layers, with padding and nested tensors."""

import copy

import pytest
import torch
from multi_head_pairs import BATCH, EMBED, HEADS, LEN_K, mask_of, pair
from torch import nn

from fastattn.nn.attention import MultiHeadAttention


class Calls:
    """Counts the calls of a module's forward by wrapping its class's."""

    def __init__(self, monkeypatch):
        self.count = 0
        forward = MultiHeadAttention.forward

        def counting(module, *args, **kwargs):
            self.count += not args[0].is_nested  # a nested call makes a dense one
            return forward(module, *args, **kwargs)

        monkeypatch.setattr(MultiHeadAttention, "forward", counting)


def encoder_layer(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True, dtype=torch.float64, **options)
    ours = copy.deepcopy(layer)
    ours.self_attn = MultiHeadAttention(EMBED, HEADS, batch_first=True, dropout=0.1, dtype=torch.float64)
    ours.load_state_dict(layer.state_dict())
    return layer, ours


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_encoder_layer_in_eval_calls_forward(monkeypatch, mode, norm_first):
    theirs, ours = (m.eval() for m in encoder_layer(norm_first=norm_first))
    calls = Calls(monkeypatch)
    x = torch.randn(BATCH, LEN_K, EMBED, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(ours(x), theirs(x))
        assert calls.count == 1
        padding = mask_of((BATCH, LEN_K), "bool")
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding)
        )
        causal = nn.Transformer.generate_square_subsequent_mask(LEN_K, dtype=torch.float64)
        expected = theirs(x, src_mask=causal, is_causal=True)
        torch.testing.assert_close(ours(x, src_mask=causal, is_causal=True), expected)
        assert calls.count == 3


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_in_eval_with_padding(monkeypatch, enable_nested_tensor):
    """nn.TransformerEncoder turns left-aligned padded batches into nested tensors before the layers see them."""
    encoders = [
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor).eval()
        for layer in encoder_layer()
    ]
    calls = Calls(monkeypatch)
    x = torch.randn(BATCH, LEN_K, EMBED, dtype=torch.float64)
    padding = torch.arange(LEN_K) >= torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        expected, actual = (e(x, src_key_padding_mask=padding) for e in encoders)
    assert calls.count == 2
    real = ~padding[..., None]
    torch.testing.assert_close(actual * real, expected * real)


def test_a_fully_padded_sample_stays_finite_in_an_encoder():
    theirs, ours = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval() for layer in encoder_layer()
    )
    x = torch.randn(BATCH, LEN_K, EMBED, dtype=torch.float64)
    padding = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        expected, actual = (e(x, src_key_padding_mask=padding) for e in (theirs, ours))
    assert expected[1].isnan().all()
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_attend_within_their_lengths():
    _, ours = pair(batch_first=True)
    rows = [torch.randn(n, EMBED, dtype=torch.float64) for n in (7, 1, 4)]
    nested = torch.nested.nested_tensor(rows)
    for causal in (False, True):
        out, weights = ours(nested, nested, nested, causal=causal)
        assert weights.shape == (3, 7, 7)
        for got, row in zip(out.unbind(), rows):
            alone = ours(row[None], row[None], row[None], need_weights=False, causal=causal)[0]
            torch.testing.assert_close(got, alone[0])
    with pytest.raises(ValueError, match="nested"):
        ours(nested, nested, nested, key_padding_mask=torch.zeros(3, 7, dtype=torch.bool))
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(ValueError, match="jagged"):
        ours(jagged, jagged, jagged)


def test_transformer_with_decoder():
    torch.manual_seed(0)
    theirs = nn.Transformer(EMBED, HEADS, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    for module in (ours.encoder.layers[0], ours.decoder.layers[0]):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(module, name):
                old = getattr(module, name)
                new = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
                new.load_state_dict(old.state_dict())
                setattr(module, name, new)
    src, tgt = (torch.randn(2, n, EMBED, dtype=torch.float64) for n in (5, 6))
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    for mode in (True, False):
        theirs.train(mode)
        ours.train(mode)
        expected, actual = (m(src, tgt, tgt_mask=causal, tgt_is_causal=True) for m in (theirs, ours))
        torch.testing.assert_close(actual, expected)
