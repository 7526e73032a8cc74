"""Measures how bfloat16 or 8-bit weights change a model's results: perplexity, or cosines of embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.models.decoder import GPT
from fastattn.models.encoder_decoder import EncoderDecoder
from fastattn.models.families import class_for, load
from fastattn.models.lora import blocks_of
from fastattn.nn.int8 import Int8Linear, in_numbered_layer
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor

_CHUNK = 8  # sequences at a time


@dataclass(frozen=True)
class Change:
    """The effect of smaller weights: perplexities of a model that generates, or cosines of an encoder's embeddings.

    Attributes:
        options: how the weights were made smaller.
        bytes_before: of the matrices that are multiplied, and of all other parameters.
        bytes_after: the same of the smaller weights.
        perplexities: before and after; None for an encoder.
        cosines: mean and least, between the embeddings before and after; None for a model that generates.
    """

    options: str
    bytes_before: int
    bytes_after: int
    perplexities: tuple[float, float] | None = None
    cosines: tuple[float, float] | None = None

    def __str__(self) -> str:
        size = f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        if self.perplexities is not None:
            before, after = self.perplexities
            return (
                f"{self.options}: {size}, perplexity {before:.4f} -> {after:.4f} ({after / before - 1:+.2%})"
            )
        assert self.cosines is not None
        mean, least = self.cosines
        return (
            f"{self.options}: {size}, cosine with the embeddings before: mean {mean:.6f}, least {least:.6f}"
        )


def compare(
    path_or_id: str | Path,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
) -> Change:
    """Load a folder as it is and with smaller weights, run both on tokens, print and return a `Change`.

    Args:
        path_or_id: a folder, or a repository's name on the Hugging Face hub.
        input_ids: (B, S) token ids of text that is typical for the model; more tokens make the figure more precise.
        attention_mask: (B, S), nonzero = a real token; None for no padding.
        labels: (B, T) targets of an encoder-decoder, whose sources input_ids are; -100 is ignored.
        dtype, quantize: as in `load`; one of them at least.

    Raises:
        ValueError: neither was given, labels are missing or have no use, or what `load` and the model raise.
    """
    if dtype is None and quantize is None:
        raise ValueError("dtype, quantize: needs one of them at least, got neither")
    if (class_for(path_or_id) is EncoderDecoder) != (labels is not None):
        what = "is an encoder-decoder, needs targets" if labels is None else "is none, needs None"
        raise ValueError(f"labels: got {'None' if labels is None else 'targets'}, and {path_or_id} {what}")
    before, after = load(path_or_id), load(path_or_id, dtype=dtype, quantize=quantize)
    names = [str(name).removeprefix("torch.") for name in (dtype, quantize) if name is not None]
    sizes = weight_bytes(before), weight_bytes(after)
    if labels is not None:
        values = [target_perplexity(model, input_ids, labels, attention_mask) for model in (before, after)]
        change = Change(" ".join(names), *sizes, perplexities=(values[0], values[1]))
    elif isinstance(before, GPT):
        values = [perplexity(model, input_ids, attention_mask) for model in (before, after)]
        change = Change(" ".join(names), *sizes, perplexities=(values[0], values[1]))
    else:
        a, b = (embeddings(model, input_ids, attention_mask) for model in (before, after))
        cosine = F.cosine_similarity(a.double(), b.double(), dim=-1)
        change = Change(" ".join(names), *sizes, cosines=(float(cosine.mean()), float(cosine.min())))
    print(change)
    return change


@torch.no_grad()
def perplexity(model: GPT, input_ids: Tensor, attention_mask: Tensor | None = None) -> float:
    """exp of the mean negative log-likelihood of each token given those before it, with the weights `generate` uses.

    Sequences (B, S) are read one at a time without their padding, from a decoder where the model has one: 8-bit
    weights are a decoder's.
    """
    total, count = 0.0, 0
    for index, row in enumerate(input_ids):
        ids = (row if attention_mask is None else row[attention_mask[index] != 0])[None]  # (1, S)
        if ids.shape[1] < 2:
            continue
        decoder = model.decoder(1, ids.shape[1])
        logits = model(ids).logits if decoder is None else decoder.logits(ids)
        assert logits is not None
        losses = F.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum")
        total, count = total + float(losses), count + ids.shape[1] - 1
    if not count:
        raise ValueError("input_ids: holds no sequence of two tokens, which a perplexity needs")
    return math.exp(total / count)


@torch.no_grad()
def target_perplexity(
    model: EncoderDecoder, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
) -> float:
    """exp of the mean negative log-likelihood of targets given their sources, with the weights `generate` uses.

    Args:
        input_ids: (B, S) sources; attention_mask (B, S), nonzero = a real token.
        labels: (B, T) targets; -100 stands after their ends. They begin after the start token.
    """
    check_tensor("labels", labels)
    if labels.dim() != 2 or len(labels) != len(input_ids) or labels.dtype not in INTEGER_DTYPES:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels: got {got}, needs integers of shape ({len(input_ids)}, length)")
    total, count = 0.0, 0
    for row, target in enumerate(labels):
        target = target[target != IGNORE_INDEX].long()
        if not len(target):
            continue
        mask = None if attention_mask is None else attention_mask[row : row + 1]
        causal, start = model.continuation(input_ids[row : row + 1], mask)
        ids = torch.cat((start, target[None, :-1]), 1)  # (1, T)
        decoder = causal.decoder(1, ids.shape[1])
        if decoder is None:
            logits = model(input_ids[row : row + 1], mask, ids).logits
        else:
            logits = decoder.logits(ids)
        total += float(F.cross_entropy(logits[0].double(), target, reduction="sum"))
        count += len(target)
    if not count:
        raise ValueError("labels: hold no token, which a perplexity needs")
    return math.exp(total / count)


@torch.no_grad()
def embeddings(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """A vector for each sequence, (B, E): the model's embeddings, else the mean of the last hidden states."""
    trunk = model if hasattr(model, "pooling") or not hasattr(model, "bert") else model.bert
    out = []
    for start in range(0, len(input_ids), _CHUNK):
        rows = slice(start, start + _CHUNK)
        mask = None if attention_mask is None else attention_mask[rows]
        result = trunk(input_ids[rows], mask)
        if hasattr(result, "embeddings"):
            out.append(result.embeddings)
            continue
        hidden = result.last_hidden_state
        real = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else (mask != 0).float()
        out.append((hidden.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(out)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights as inference multiplies them, and of the other parameters."""
    small = {id(module.weight) for module in model.modules() if type(module) is Int8Linear}
    for part in model.modules():
        if isinstance(part, GPT) and part.quantized:  # its decoder rounds what the blocks multiply with
            layers = [block for block in blocks_of(part) if in_numbered_layer(block.ours)]
            small |= {id(part.get_parameter(block.ours)) for block in layers}
    total = 0
    for parameter in model.parameters():
        rounded = id(parameter) in small
        total += parameter.numel() * (1 if rounded else parameter.element_size())
        total += 4 * parameter.shape[0] if rounded else 0  # a scale for each output
    return total
