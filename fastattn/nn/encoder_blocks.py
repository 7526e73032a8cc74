"""The encoder's block: self-attention and an MLP over packed tokens, pre- or post-norm."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.nn.blocks import Mlp
from fastattn.nn.dropout import Dropout
from fastattn.nn.linear import Linear, remade
from fastattn.nn.norms import normalised
from fastattn.nn.positions import RotaryTable, apply_rotary
from fastattn.nn.unpadding import Tokens, Window


class SelfAttention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(D)) v) with q, k, v from one product; every token sees its own sequence."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout, self.window = dropout, window
        self.qkv = Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        *,
        rotary: RotaryTable | None = None,
        weights: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(T, E) -> (T, E), and the weights (B, H, S, S) if asked for; rotary: cos and sin (T, D/2).

        rows: (N,), ascending: only these tokens' results, (N, E), without a window and without weights.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # (T, H, D)
        if rotary is not None:
            q, k = (apply_rotary(t.transpose(0, 1)[None], rotary)[0].transpose(0, 1) for t in (q, k))
        dropout_p = self.dropout if self.training else 0.0
        if rows is None:
            out, shown = tokens.attend(q, k, v, window=self.window, weights=weights, dropout_p=dropout_p)
        else:
            out, shown = tokens.attend_from(rows, q.index_select(0, rows), k, v, dropout_p=dropout_p), None
        return self.out_proj(out.flatten(1)), shown


class EncoderMlp(Mlp):
    """An `Mlp` with dropout before c_proj; the dropout after the MLP belongs to the block."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, E) -> (T, E)."""
        if self._keeps_nothing(x):
            return self._in_parts(x)
        out: Tensor = self.c_proj(self.dropout(remade(self.activation, self.c_fc(x))))
        return out


class EncoderBlock(nn.Module):
    """norm(x + attn(x)), then norm(x + mlp(x)), as BERT; where pre_norm, x + attn(norm(x)), then x + mlp(norm(x)).

    ln_1 belongs to attention and ln_2 to the MLP, whichever side they are on; ln_1 may be `nn.Identity`.
    """

    def __init__(
        self, attn: SelfAttention, mlp: EncoderMlp, ln_1: nn.Module, ln_2: nn.Module, *,
        pre_norm: bool, attn_dropout: float, mlp_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attn, self.mlp, self.ln_1, self.ln_2 = attn, mlp, ln_1, ln_2
        self.pre_norm = pre_norm
        self.attn_dropout, self.mlp_dropout = Dropout(attn_dropout), Dropout(mlp_dropout)

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        *,
        rotary: RotaryTable | None = None,
        weights: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(T, E) -> (T, E), and the weights (B, H, S, S) if asked for; rows: as in `SelfAttention.forward`."""
        seen = normalised(self.ln_1, x) if self.pre_norm else x
        h, shown = self.attn(seen, tokens, rotary=rotary, weights=weights, rows=rows)
        x = x if rows is None else x.index_select(0, rows)
        if self.pre_norm:
            x = x + self.attn_dropout(h)
            return x + self.mlp_dropout(self.mlp(normalised(self.ln_2, x))), shown
        x = normalised(self.ln_1, x + self.attn_dropout(h))
        return normalised(self.ln_2, x + self.mlp_dropout(self.mlp(x))), shown
