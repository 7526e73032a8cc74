"""The projections of multi-head attention: torch's parameters, and tensors by head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.linear import linear
from fastattn.nn.positions import Rotary, RotaryTable, apply_rotary


class Heads(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` without its forward: the inputs projected, split, placed and merged again."""

    num_kv_heads: int
    rotary: Rotary | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def _resize_projections(self) -> None:
        """Give torch's projections the sizes of num_kv_heads and head_dim, initialised as torch would."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = {"k_proj_weight": kv_dim, "v_proj_weight": kv_dim}
        rows |= {"in_proj_weight": q_dim + 2 * kv_dim, "in_proj_bias": q_dim + 2 * kv_dim}
        for name, size in rows.items():
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(old.new_empty((size, *old.shape[1:]))))
        for name in ("bias_k", "bias_v"):
            if (old := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(old.new_empty((1, 1, kv_dim))))
        if q_dim != self.embed_dim:
            out = self.out_proj
            out.in_features, out.weight = q_dim, nn.Parameter(out.weight.new_empty((self.embed_dim, q_dim)))
            nn.init.kaiming_uniform_(out.weight, a=math.sqrt(5))  # torch.nn.Linear's
        self._initialise()

    def _initialise(self) -> None:
        """Draw the parameters as torch's module does, in the same order."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head; one product of the packed weights where the inputs are one tensor."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = self._split_heads(linear(query, weight, bias)).split(heads, dim=1)
            return q, k, v
        rows = [n * self.head_dim for n in heads]
        if weight is not None:
            weights = weight.split(rows)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.split(rows)
        q, k, v = (
            self._split_heads(linear(x, w, b)) for x, w, b in zip((query, key, value), weights, biases)
        )
        return q, k, v

    def _project_out(self, out: Tensor) -> Tensor:
        """(..., H * D) -> (..., E)."""
        return linear(out, self.out_proj.weight, self.out_proj.bias)

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view (B, heads, S, D) of (S, heads * D), (B, S, heads * D) or, sequence first, (S, B, heads * D)."""
        x = x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim))  # no -1: a size may be 0
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, out: Tensor, batched: bool) -> Tensor:
        """The inverse of `_split_heads`; no copy, as attention keeps the query's memory order."""
        if not batched:
            return out.squeeze(0).transpose(0, 1).flatten(-2)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)

    def _place(self, q: Tensor, k: Tensor, table: RotaryTable | None, past: int) -> tuple[Tensor, Tensor]:
        """Apply qk_norm and rotary embedding to queries and keys, where the module has them."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            interleaved = self.rotary is not None and self.rotary.interleaved
            q, k = (apply_rotary(x, table, interleaved=interleaved) for x in (q, k))
        elif self.rotary is not None:
            seqlen_q, seqlen_k = q.shape[2], k.shape[2]
            first = past + min(0, seqlen_k - seqlen_q)  # the last query and the last key share a position
            positions = torch.arange(first, past + seqlen_k, device=q.device)
            cos, sin = self.rotary.table(positions, torch.promote_types(q.dtype, torch.float32))
            q, k = (
                self.rotary.apply(x, (cos[len(positions) - n :], sin[len(positions) - n :]))
                for x, n in ((q, seqlen_q), (k, seqlen_k))
            )
        return q, k

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with the learned pair of add_bias_kv and then the zero pair of add_zero_attn appended."""
        if self.bias_k is not None and self.bias_v is not None:
            shape = (k.shape[0], self.num_kv_heads, 1, self.head_dim)
            last_k, last_v = (
                b.to(k.dtype).view(1, *shape[1:]).expand(shape) for b in (self.bias_k, self.bias_v)
            )
            k, v = torch.cat((k, last_k), dim=2), torch.cat((v, last_v), dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v
