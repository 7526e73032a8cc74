"""The decoder's block: attention, cross-attention and an MLP, each added to the residual stream, pre- or post-norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.cross_attention import CrossAttention, Memory
from fastattn.nn.dropout import Dropout
from fastattn.nn.int8 import Int8Linear
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.linear import Linear, recorded_by_autograd_alone, remade, without_transforms
from fastattn.nn.norms import normalised
from fastattn.nn.positions import RotaryTable
from fastattn.nn.rows import PART_ELEMENTS, in_parts

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# Those that oneDNN computes in the kernel of a product, in its names; its relu would give 0 for NaN.
FUSED: dict[Activation, tuple[str, str]] = {
    ACTIVATIONS["gelu"]: ("gelu", "none"),
    ACTIVATIONS["gelu_new"]: ("gelu", "tanh"),
    ACTIVATIONS["gelu_pytorch_tanh"]: ("gelu", "tanh"),
    ACTIVATIONS["silu"]: ("swish", ""),
}


class Mlp(nn.Module):
    """c_proj(activation(c_fc(x))), then dropout: (..., E) -> (..., hidden_dim) -> (..., E).

    Args:
        embed_dim, hidden_dim: E, and the width between the two products.
        activation: a key of `ACTIVATIONS`: "gelu", "gelu_new", "gelu_pytorch_tanh", "relu" or "silu".
        bias: whether the two linear layers have biases.
        dropout: of the result.
        gated: c_fc has 2 * hidden_dim outputs, the gate and the rest, and c_proj takes activation(gate) * rest:
            SwiGLU with "silu", GeGLU with a gelu. Shazeer 2020, "GLU Variants Improve Transformer".

    Raises:
        KeyError: activation is none of these.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        activation: str,
        bias: bool = True,
        dropout: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.c_fc = Linear(embed_dim, 2 * hidden_dim if gated else hidden_dim, bias=bias)
        self.c_proj = Linear(hidden_dim, embed_dim, bias=bias)
        self.activation = partial(gated_by, ACTIVATIONS[activation]) if gated else ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        if self._keeps_nothing(x):
            return self._in_parts(x)
        return self.dropout(self.c_proj(remade(self.activation, self.c_fc(x))))

    def _keeps_nothing(self, x: Tensor) -> bool:
        """Whether a large input may go through in parts: no gradient follows, no dropout, and nothing sees the calls of
        the layers."""
        return (
            not torch.is_grad_enabled()
            and recorded_by_autograd_alone(x)  # before the sizes: under tracing, comparing them adds a guard
            and x.is_cpu
            and x.dim() >= 2
            and all(type(layer) in (Linear, Int8Linear) for layer in (self.c_fc, self.c_proj))
            and x.shape[:-1].numel() * self.c_fc.out_features > PART_ELEMENTS
            and not (self.dropout.p and self.training)
            and without_transforms(x)
            and not any(map(torch_compat.has_hooks, (self.c_fc, self.c_proj, self.dropout)))
        )

    def _in_parts(self, x: Tensor) -> Tensor:
        def part(rows: Tensor) -> Tensor:
            out: Tensor = self.c_proj(self.activation(self.c_fc(rows)))
            return out

        return in_parts(part, x.flatten(0, -2), self.c_fc.out_features).unflatten(0, x.shape[:-1])


def gated_by(activation: Activation, x: Tensor) -> Tensor:
    """activation(gate) * rest, where gate and rest are the halves of the last dimension: (..., 2 * I) -> (..., I)."""
    tracked = x.requires_grad and torch.is_grad_enabled()
    if tracked and recorded_by_autograd_alone(x) and without_transforms(x):
        out: Tensor = _Gated.apply(x, activation)
        return out
    gate, rest = x.chunk(2, dim=-1)
    return activation(gate) * rest


class _Gated(torch.autograd.Function):
    """activation(gate) * rest, whose backward makes activation(gate) again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        gate, rest = x.chunk(2, dim=-1)
        return activation(gate).mul_(rest)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gate, rest = x.chunk(2, dim=-1)
        again = torch.is_grad_enabled()  # a graph of the gradient is wanted
        with torch.enable_grad():
            of_gate = gate if again else gate.detach().requires_grad_()
            active = ctx.activation(of_gate)
            (dgate,) = torch.autograd.grad(active, of_gate, dout * rest, create_graph=again)
        return torch.cat((dgate, dout * (active if again else active.detach())), dim=-1), None


class Transform(nn.Module):
    """norm(activation(dense(x))): (..., width) -> (..., out).

    Args:
        width, out: sizes of the last dimension before and after.
        activation: a key of `ACTIVATIONS`, or "tanh".
        bias: whether the dense layer has one.
        norm: a module over the last dimension, None for none.

    Raises:
        KeyError: activation is none of these.
    """

    def __init__(self, width: int, out: int, *, activation: str, bias: bool, norm: nn.Module | None) -> None:
        super().__init__()
        self.dense = Linear(width, out, bias=bias)
        self.activation = {**ACTIVATIONS, "tanh": torch.tanh}[activation]
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., out)."""
        h = remade(self.activation, self.dense(x))
        return h if self.norm is None else normalised(self.norm, h)


class PreNormBlock(nn.Module):
    """x + dropout(attn(ln_1(x))), then x + mlp(ln_2(x)); causal self-attention over (B, S, E).

    Args:
        attn: a `MultiHeadAttention` with batch_first=True.
        mlp: the MLP.
        norm: makes a norm module of a width; torch.nn.LayerNorm by default.
        sandwich: the outputs of attention and MLP have norms of their own, `ln_1_out` and `ln_2_out`, before they are
            added, as in Gemma 2.
        dropout: of what attention and cross-attention add.
        cross_attn: between attention and MLP, x + dropout(cross_attn(ln_cross(x), memory)) where there is a memory.
    """

    def __init__(
        self,
        attn: MultiHeadAttention,
        mlp: Mlp,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        sandwich: bool = False,
        dropout: float = 0.0,
        cross_attn: CrossAttention | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = norm(attn.embed_dim)
        self.attn = attn
        self.ln_1_out = norm(attn.embed_dim) if sandwich else None
        self.ln_cross = None if cross_attn is None else norm(attn.embed_dim)
        self.cross_attn = cross_attn
        self.ln_2 = norm(attn.embed_dim)
        self.mlp = mlp
        self.ln_2_out = norm(attn.embed_dim) if sandwich else None
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        weights: list[Tensor] | None = None,
        memory: Memory | None = None,
        cross_weights: list[Tensor] | None = None,
        **visible: Any,
    ) -> Tensor:
        """(B, S, E) -> (B, S, E).

        Args:
            x: (B, S, E).
            weights, cross_weights: lists to which the attention weights are added, (B, H, S, S) and (B, H, S, Sk); they
                are not made without.
            memory: what cross-attention reads.
            visible: key_padding_mask, segment_ids, rotary and cache, as in `MultiHeadAttention.forward`.
        """
        h = self._attend(normalised(self.ln_1, x), weights, **visible)
        if self.ln_1_out is not None:
            h = self.ln_1_out(h)
        x = x + self.dropout(h)
        if self.cross_attn is not None and self.ln_cross is not None and memory is not None:
            x = x + self.dropout(self.cross_attn(normalised(self.ln_cross, x), memory, cross_weights))
        h = self.mlp(normalised(self.ln_2, x))
        return x + (h if self.ln_2_out is None else self.ln_2_out(h))  # (B, S, E)

    def _attend(
        self,
        h: Tensor,
        weights: list[Tensor] | None,
        *,
        key_padding_mask: Tensor | None = None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary: RotaryTable | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        h, probs = self.attn(
            h,
            h,
            h,
            key_padding_mask,
            need_weights=weights is not None,
            average_attn_weights=False,
            causal=True,
            segment_ids=segment_ids,
            rotary=rotary,
            cache=cache,
        )  # (B, S, E), (B, H, S, S) or None
        if weights is not None and probs is not None:
            weights.append(probs)
        return h


class PostNormBlock(PreNormBlock):
    """ln_1(x + dropout(attn(x))), then ln_cross and ln_2 likewise after cross-attention and MLP, as in BERT."""

    def forward(
        self,
        x: Tensor,
        *,
        weights: list[Tensor] | None = None,
        memory: Memory | None = None,
        cross_weights: list[Tensor] | None = None,
        **visible: Any,
    ) -> Tensor:
        """(B, S, E) -> (B, S, E), with the arguments of `PreNormBlock.forward`."""
        x = normalised(self.ln_1, x + self.dropout(self._attend(x, weights, **visible)))
        if self.cross_attn is not None and self.ln_cross is not None and memory is not None:
            x = normalised(self.ln_cross, x + self.dropout(self.cross_attn(x, memory, cross_weights)))
        return normalised(self.ln_2, x + self.mlp(x))
