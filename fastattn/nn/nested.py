"""Multi-head attention of nested tensors, by padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn.masks import ShapeError


def forward_nested(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Pad, attend within each sequence's length, and cut the output back; the weights stay padded.

    options: those of the module's forward about weights.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_nested or tensor.layout != torch.strided or not module.batch_first:
            got = f"nested={tensor.is_nested}, layout={tensor.layout}, batch_first={module.batch_first}"
            raise ShapeError(f"{name}: got {got}, needs all three nested and strided, and batch_first")
    lengths_q, lengths_k = ([row.shape[0] for row in tensor.unbind()] for tensor in (query, key))
    if causal and lengths_q != lengths_k:
        raise ShapeError("key: causal nested attention needs the query's lengths")
    padded_q = torch.nested.to_padded_tensor(query, 0.0)
    padded_k = padded_q if key is query else torch.nested.to_padded_tensor(key, 0.0)
    padded_v = padded_k if value is key else torch.nested.to_padded_tensor(value, 0.0)
    lengths = torch.tensor(lengths_k, dtype=torch.int32, device=query.device)
    out, weights = module.forward(padded_q, padded_k, padded_v, causal=causal, key_lengths=lengths, **options)
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths_q)]), weights
