"""The pre-norm transformer block: attention and an MLP, each behind a norm and added to the stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.linear import Linear, remade
from fastattn.nn.positions import RotaryTable

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """c_proj(activation(c_fc(x))), then dropout: (..., E) -> (..., hidden_dim) -> (..., E)."""

    def __init__(
        self, embed_dim: int, hidden_dim: int, *, activation: str, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.c_fc = Linear(embed_dim, hidden_dim, bias=bias)
        self.c_proj = Linear(hidden_dim, embed_dim, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        return self.dropout(self.c_proj(remade(self.activation, self.c_fc(x))))


class PreNormBlock(nn.Module):
    """x + dropout(attn(ln_1(x))), then x + mlp(ln_2(x)); causal self-attention over (B, S, E)."""

    def __init__(
        self,
        attn: MultiHeadAttention,
        mlp: Mlp,
        *,
        norm_eps: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(attn.embed_dim, eps=norm_eps, bias=bias)
        self.attn = attn
        self.ln_2 = nn.LayerNorm(attn.embed_dim, eps=norm_eps, bias=bias)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary: RotaryTable | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, S, E) -> (B, S, E); the options are those of `MultiHeadAttention.forward`."""
        h = normalised(self.ln_1, x)
        h, _ = self.attn(
            h,
            h,
            h,
            key_padding_mask,
            need_weights=False,
            causal=True,
            segment_ids=segment_ids,
            rotary=rotary,
            cache=cache,
        )  # (B, S, E)
        x = x + self.dropout(h)
        return x + self.mlp(normalised(self.ln_2, x))  # (B, S, E)


def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x), which the linear layers behind it make again in their backward."""
    if type(norm) is not nn.LayerNorm or torch_compat.has_hooks(norm):  # what it does is not only the formula
        out: Tensor = norm(x)
        return out
    return remade(partial(_layer_norm, norm.normalized_shape, norm.eps), x, norm.weight, norm.bias)


def _layer_norm(
    shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)
