"""Cross-attention of a decoder's tokens to an encoder's; padding of the encoder's is not computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastattn.nn.linear import Linear
from fastattn.nn.unpadding import Tokens
from fastattn.ops.attention import attention
from fastattn.ops.varlen import attention_varlen


@dataclass
class Memory:
    """An encoder's last hidden state for a decoder to read.

    kept: if a dict, each layer's keys and values are computed at its first call and kept there for later calls, for the
        steps of generation; a second backward cannot go through them.
    readers: where the decoder's tokens stand, whose sequences are packed in one row (1, Tq, E); None = they are padded,
        (B, Sq, E).
    """

    x: Tensor  # (T, E)
    tokens: Tokens  # where these stand in (B, S)
    kept: dict[nn.Module, Tensor] | None = None
    readers: Tokens | None = None

    def keys_and_values(self, layer: CrossAttention) -> Tensor:
        """(T, 2, H, D) of a layer."""
        if self.kept is not None and layer in self.kept:
            return self.kept[layer]
        made = layer.kv(self.x).unflatten(-1, (2, layer.num_heads, layer.head_dim))
        if self.kept is not None:
            self.kept[layer] = made
        return made

    def repeated(self, copies: int) -> Memory:
        """Each sequence repeated `copies` times, copies next to each other."""
        if copies == 1:
            return self
        tokens = self.tokens
        x = tokens.pad(self.x).repeat_interleave(copies, 0)
        real = None if tokens.real is None else tokens.real.repeat_interleave(copies, 0)
        again = Tokens.of(real, tokens.batch * copies, tokens.seqlen)
        return Memory(again.pack(x), again, None if self.kept is None else {})


class CrossAttention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(D)) v): q of a decoder's tokens, k and v of the encoder's, from one product."""

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = num_heads, embed_dim // num_heads, dropout
        self.q = Linear(embed_dim, embed_dim, bias=bias)
        self.kv = Linear(embed_dim, 2 * embed_dim, bias=bias)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor, memory: Memory, weights: list[Tensor] | None = None) -> Tensor:
        """(B, Sq, E) -> (B, Sq, E), or of a row (1, Tq, E) that `memory.readers` describes.

        weights: a list to which the attention weights are added, (B, H, Sq, Sk), 0 at padding; not of a row.
        """
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))  # (B, Sq, H, D)
        k, v = memory.keys_and_values(self).unbind(1)  # (T, H, D)
        tokens, dropout_p = memory.tokens, self.dropout if self.training else 0.0
        readers = memory.readers or Tokens(x.shape[0], x.shape[1], longest=x.shape[1])
        if memory.readers is not None or (tokens.cu_seqlens is not None and weights is None):
            packed = attention_varlen(
                q.flatten(0, 1), k, v, readers.starts(x.device), tokens.starts(x.device), readers.longest,
                tokens.longest, dropout_p=dropout_p,
            )  # fmt: skip
            return self.out_proj(packed.reshape(x.shape))
        k, v = (tokens.pad(t).transpose(1, 2) for t in (k, v))  # (B, H, Sk, D)
        seen = None if tokens.real is None else tokens.real[:, None, None]
        out = attention(
            q.transpose(1, 2), k, v, mask=seen, dropout_p=dropout_p, return_weights=weights is not None
        )
        if isinstance(out, tuple):
            out, shown = out
            assert weights is not None
            weights.append(shown)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))
