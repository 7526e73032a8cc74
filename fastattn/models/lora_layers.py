"""The layers of LoRA: adapters, linear layers and attention with adapters, and where in a model they can be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.checkpoint.families import family_for
from fastattn.models.checkpoint.names import placed
from fastattn.models.checkpoint.pretrained import Pretrained
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.dropout import Dropout
from fastattn.nn.int8 import Int8Linear
from fastattn.nn.linear import Linear, linear


@dataclass(frozen=True)
class Block:
    """Rows of a weight that form one linear layer in transformers' model, such as the keys' rows of a packed weight."""

    name: str  # of that layer in transformers' model; in a model of no family, of ours
    ours: str  # of our weight
    start: int
    stop: int
    transposed: bool  # the layer keeps its weight as (in, out)


class Adapter(nn.Module):
    """scale * B A dropout(x): (..., in) -> (..., rows); A (r, in) drawn as torch's linear layers, B (rows, r) zeros."""

    def __init__(
        self, block: Block, weight: Tensor, *, r: int, alpha: float, dropout: float, rslora: bool
    ) -> None:
        super().__init__()
        self.block, self.r, self.alpha, self.rslora = block, r, alpha, rslora
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        # trained in float32 where the weights are narrower
        options: dict[str, Any] = {
            "device": weight.device,
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        self.lora_A = nn.Parameter(torch.empty(r, weight.shape[1], **options))
        self.lora_B = nn.Parameter(torch.zeros(block.stop - block.start, r, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., rows), in x's dtype."""
        low = linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
        return (linear(low, self.lora_B) * self.scale).to(x.dtype)

    def weight(self) -> Tensor:
        """scale * B A, (rows, in), in float64."""
        return self.scale * (self.lora_B.detach().double() @ self.lora_A.detach().double())


class LoraLinear(Linear):
    """A linear layer with adapters; its own weight keeps its name."""

    lora: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias) + _deltas(
            input, _of(self.lora, "weight"), self.out_features
        )


class LoraAttention(MultiHeadAttention):
    """Multi-head attention with adapters on rows of the packed input projection and on the output projection."""

    lora: nn.ModuleDict

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain = super()._project(query, key, value)
        adapters = _of(self.lora, "in_proj_weight")
        if not adapters:
            return plain
        total = self.in_proj_weight.shape[0]
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        same = query is key and key is value
        wholes = [_deltas(x, adapters, total) for x in ((query,) if same else (query, key, value))]
        split = [self._split_heads(whole).split(heads, dim=1) for whole in wholes]
        q, k, v = (p + split[0 if same else i][i] for i, p in enumerate(plain))
        return q, k, v

    def _project_out(self, out: Tensor) -> Tensor:
        plain = super()._project_out(out)
        adapters = _of(self.lora, "out_proj.weight")
        return plain + _deltas(out, adapters, self.embed_dim) if adapters else plain


def _of(lora: nn.ModuleDict, weight: str) -> list[Adapter]:
    """The adapters on the weight whose name ends so, in the order of its rows."""
    found = [a for a in lora.values() if isinstance(a, Adapter) and a.block.ours.endswith(weight)]
    return sorted(found, key=lambda adapter: adapter.block.start)


def _deltas(x: Tensor, adapters: Sequence[Adapter], total: int) -> Tensor:
    """The sum that adapters add to the `total` outputs of one weight; 0 for rows without an adapter."""
    pieces, end = [], 0
    for adapter in adapters:
        pieces.append(F.pad(adapter(x), (adapter.block.start - end, 0)))
        end = adapter.block.stop
    pieces[-1] = F.pad(pieces[-1], (0, total - end))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def check_not_quantized(model: nn.Module) -> None:
    """Raise ValueError for a model that multiplies with 8-bit weights: its layers can have no adapters."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear) or getattr(module, "quantized", None) is not None:
            raise ValueError(
                f"model: {name or type(model).__name__} is quantized to 8 bits, needs model.quantize(None) for adapters"
            )


def blocks_of(model: nn.Module) -> list[Block]:
    """Every linear layer of a model that can have an adapter, in transformers' names if the model is a `Pretrained`.

    Weights that other modules share, such as a head tied to the embedding, are left out: merging would change both.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = [
        (name, weight) for name, weight in _weights(model) if owners[id(weight)] == 1 and weight.dim() == 2
    ]
    rows: dict[str, list[Block]] = {}
    if isinstance(model, Pretrained):
        family = family_for(model.config, model.families)
        for name, place in placed(family, [name for name, _ in found]).items():
            total = dict(found)[name].shape[0]
            rows[name] = _consecutive(
                name,
                [
                    (t.removesuffix(".weight"), n)
                    for t, n in zip(place.theirs, place.part.rows(model.config, total))
                ],
                place.part.transposed,
            )
    else:
        for name, weight in found:
            path, _, leaf = name.rpartition(".")
            attn = model.get_submodule(path)
            if leaf == "in_proj_weight" and isinstance(attn, MultiHeadAttention):
                kv_rows = attn.num_kv_heads * attn.head_dim
                sizes = zip(("q_proj", "k_proj", "v_proj"), (weight.shape[0] - 2 * kv_rows, kv_rows, kv_rows))
                parts = [(f"{path}.{n}".lstrip("."), size) for n, size in sizes]
            else:
                parts = [(path, weight.shape[0])]
            rows[name] = _consecutive(name, parts, False)
    return [block for name, _ in found for block in rows[name]]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of linear layers with their names."""
    inner = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        front = f"{path}." if path else ""
        if type(module) in (MultiHeadAttention, LoraAttention):
            assert isinstance(module, MultiHeadAttention)
            if module.in_proj_weight is not None:
                yield front + "in_proj_weight", module.in_proj_weight
            yield front + "out_proj.weight", module.out_proj.weight
        elif type(module) in (nn.Linear, Linear, LoraLinear) and id(module) not in inner:
            yield front + "weight", module.weight


def _consecutive(ours: str, parts: Iterable[tuple[str, int]], transposed: bool) -> list[Block]:
    blocks, start = [], 0
    for name, size in parts:
        blocks.append(Block(name, ours, start, start + size, transposed))
        start += size
    return blocks
