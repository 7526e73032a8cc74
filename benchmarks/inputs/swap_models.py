"""Models of torch, transformers, timm and open_clip with random weights, for `swap_attention`.

Each function returns a model in evaluation mode, its inputs and a call of (model, inputs); `small` asks for a size that
runs in a moment. timm and open_clip_torch are needed for their own models only; where one of them is missing, or cannot
be imported, its cases are "unavailable".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Made = tuple[nn.Module, Inputs, Callable[[Any, Inputs], Tensor]]

WIDTH, HEADS = 512, 8


def imported(name: str) -> Any:
    """The module of a library. ImportError with the reason where its import fails, be it by another error, as that of
    timm and open_clip fails beside a torchvision made for another torch."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise
    except Exception as error:
        raise ImportError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def timm_vit(batch: int, length: int, small: bool) -> Made:
    """A vision transformer of timm's; `length` is the side of a square image in pixels."""
    timm = imported("timm")
    name = "test_vit" if small else "vit_small_patch16_224"
    side = 160 if small else length
    model = timm.create_model(name, pretrained=False, num_classes=10, img_size=side).eval()
    return model, {"images": torch.randn(batch, 3, side, side)}, lambda m, x: m(x["images"])


def open_clip(batch: int, length: int, small: bool) -> Made:
    """Both towers of a CLIP: images of 224 pixels a side and captions of `length` tokens."""
    open_clip = imported("open_clip")
    model = open_clip.create_model("RN50" if small else "ViT-B-32", pretrained=None).eval()
    captions = torch.randint(1, 1000, (batch, model.context_length))
    captions[:, length:] = 0

    def call(m: Any, x: Inputs) -> Tensor:
        return torch.cat([m.encode_image(x["images"]), m.encode_text(x["captions"])])

    return model, {"images": torch.randn(batch, 3, 224, 224), "captions": captions}, call


def bert(batch: int, length: int, small: bool) -> Made:
    """The encoder of BERT base with four layers on padded batches: lengths from a quarter of `length` to all of it."""
    from transformers import BertConfig, BertModel

    width = 64 if small else 768
    config = BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=12 if not small else 4,
        num_hidden_layers=2 if small else 4, vocab_size=1000, attn_implementation="sdpa",
    )  # fmt: skip
    model = BertModel(config).eval()
    inputs = _padded(batch, length, left=False)
    return model, inputs, lambda m, x: m(**x).last_hidden_state * x["attention_mask"][..., None]


def llama(batch: int, length: int, small: bool, padded: bool, new_tokens: int = 16) -> Made:
    """Greedy generation after prompts, padded on the left where asked, with grouped heads and rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 64 if small else 768
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_attention_heads=4 if small else 12,
        num_key_value_heads=2 if small else 4, num_hidden_layers=2 if small else 6, vocab_size=1000,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    inputs = _padded(batch, length, left=True, shortest=0.25 if padded else 1.0)
    new = 4 if small else new_tokens

    def call(m: Any, x: Inputs) -> Tensor:
        ids: Tensor = m.generate(**x, max_new_tokens=new, do_sample=False)
        return ids

    return model, inputs, call


def torch_encoder(batch: int, length: int, small: bool, padded: bool = False) -> Made:
    """torch.nn.TransformerEncoder of four layers; padded with a key padding mask where asked."""
    width = 64 if small else WIDTH
    layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2 if small else 4, enable_nested_tensor=False).eval()
    inputs = {"src": torch.randn(batch, length, width)}
    if not padded:
        return model, inputs, lambda m, x: m(**x)
    inputs["src_key_padding_mask"] = _padded(batch, length, left=False)["attention_mask"] == 0
    return model, inputs, lambda m, x: m(**x) * ~x["src_key_padding_mask"][..., None]


def cross_attention(batch: int, length: int, small: bool, memory_length: int = 1024) -> Made:
    """torch.nn.MultiheadAttention from few queries to a long memory."""
    width = 64 if small else WIDTH
    model = nn.MultiheadAttention(width, HEADS, batch_first=True).eval()
    memory = torch.randn(batch, 64 if small else memory_length, width)
    inputs = {"query": torch.randn(batch, length, width), "key": memory, "value": memory}
    return model, inputs, lambda m, x: m(**x, need_weights=False)[0]


def _padded(batch: int, length: int, left: bool, shortest: float = 0.25) -> Inputs:
    """Ids and their mask, (batch, length): rows of lengths spread evenly from `shortest` of the length to all of it."""
    ids = torch.randint(1, 1000, (batch, length))
    lengths = torch.linspace(shortest, 1.0, batch).mul(length).ceil().long() if batch > 1 else [length]
    mask = torch.zeros(batch, length, dtype=torch.long)
    for row, n in enumerate(lengths):
        part = slice(length - int(n), None) if left else slice(0, int(n))
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}
