"""One step of generation for a GPT: the blocks on rows, over caches of a fixed size, each sequence at its own length.

What does not change between steps is settled when a decoder is made: checks, the products with each weight, the table
of positions. A prompt's padding is moved behind its tokens, so that causality hides it and no mask is needed; the
tokens that follow overwrite it in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.appending import Attend, attend_prompts, of_whole_caches, one_by_one, suits
from fastattn.models.checks import check_range
from fastattn.models.decodable import Decodable
from fastattn.models.decoder_inputs import count_positions, embedding_scale
from fastattn.models.sources import Sources
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.blocks import FUSED, PreNormBlock
from fastattn.nn.cross_attention import Memory
from fastattn.nn.kv_cache import copy_sequences
from fastattn.nn.norms import RMSNorm, rms_norm
from fastattn.nn.positions import RotaryTable, apply_rotary, sinusoids
from fastattn.nn.rows import Elementwise, InBlocks, Rows, by_row, in_parts, rows_of
from fastattn.ops.key_blocks import whole_blocks
from fastattn.ops.kv_cache import attention_kv_cache
from fastattn.ops.varlen import attention_varlen

PACKED_SHARE = 0.9  # prompts are packed without padding if at most this share of their ids are real tokens


class _Block(NamedTuple):
    """A block's parts, its products made ready."""

    module: PreNormBlock
    qkv: Rows
    out: Rows
    c_fc: Rows  # and the activation
    c_proj: Rows
    cross_q: Rows | None = None
    cross_out: Rows | None = None

    def mlp(self, x: Tensor) -> Tensor:
        """(N, E) -> (N, E)"""
        return self.c_proj(self.c_fc(x))


class GPTDecoder:
    """Caches for `batch` sequences of up to `capacity` tokens, and the steps that fill them.

    `prefill` reads the prompts, `step` appends a token to each sequence and `extend` several; `rewind` takes tokens
    back and `reorder` copies sequences, as beams need.

    batch_invariant: every result has the bits that its sequence has alone: prompts are read one at a time, the products
    of a step are made in blocks of a fixed number of rows, and activations by row.
    memory: the encoder's output for the sources of the first sequences; `reorder` copies it to the others. Its keys and
    values are computed once.
    """

    def __init__(
        self,
        model: Decodable,
        batch: int,
        capacity: int,
        *,
        batch_invariant: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.invariant = model, batch_invariant
        device = model.wte.weight.device
        attentions = [cast(MultiHeadAttention, block.attn) for block in model.h]
        suited = device.type == "cpu" and all(map(suits, attentions))
        self.in_blocks = suited and batch_invariant
        self.masks = suited and not batch_invariant and not any(attn.softcap for attn in attentions)
        # (B, Hkv, C, D)
        self.cache = [
            (layer.keys, layer.values) for layer in model.new_cache(batch, self._room_for(capacity))
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._make_products(
            once=not batch_invariant
        )  # whose results are to be the same in prompts and in steps
        self.sources = (
            None if memory is None else Sources(model.h, memory, batch, self._rows, invariant=batch_invariant)
        )
        self.kinds = model.config.kinds
        self._make_positions(capacity)

    def _room_for(self, capacity: int) -> int:
        """Tokens of each sequence that the caches are made for."""
        return whole_blocks(capacity) if self.in_blocks or self.masks else capacity

    def _make_positions(self, count: int) -> None:
        """What the first `count` positions of a sequence add to tokens, and the angles that they turn keys by."""
        model = self.model
        places = torch.arange(count, device=model.wte.weight.device)
        self.positions = None if model.wpe is None else model.wpe.weight  # (C or more, E)
        if model.config.positions == "sinusoidal":
            self.positions = sinusoids(places, model.config.n_embd, model.wte.weight.dtype)
        self.wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
        self.rotary = {  # by kind of layer, (C, D/2) twice; each token is the last of its sequence when it comes
            kind: rotary.table(places, self.wide, places + 1) for kind, rotary in model.rotary.items()
        }

    @torch.no_grad()
    def prefill(self, ids: Tensor, lengths: Tensor | None = None, *, chunk_size: int | None = None) -> Tensor:
        """Read prompts (N, S) into the empty caches of the first N sequences; logits of the token after each, (N, V).

        Args:
            ids: (N, S), N at most the batch; `reorder` copies prompts to the other sequences.
            lengths: (N,), how many of each row's ids are tokens; they come first. None = all S.
            chunk_size: most tokens of a row that are read at once, which bounds the memory of activations; None = all.
        """
        count, seqlen = ids.shape
        check_range("input_ids", ids, self.model.config.vocab_size, "vocab_size")
        own = self.lengths[:count]
        own.copy_(torch.full_like(own, seqlen) if lengths is None else lengths)
        size = chunk_size or max(seqlen, 1)
        if self.invariant:
            ends = own.tolist()
            last = torch.cat([self._last(ids[i : i + 1, :n], i, None, size) for i, n in enumerate(ends)])
        elif size >= seqlen and self._mostly_padding(ids, lengths):
            last = self._last_of_packed(ids, own.long())
        else:
            last = self._last(ids, 0, None if lengths is None else own.long() - 1, size)
        return self._logits(last)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each sequence, (B,); logits of the token after it, (B, V)."""
        if self.once:
            self._make_products(once=False)
        x = self._embed(tokens, self.lengths)  # (B, E)
        logits = self._logits(self._through_blocks(x, 1, self._appending(self.lengths)))
        self.lengths += 1
        return logits

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append several tokens to each sequence, (B, n); logits of the token after each of them, (B, n, V).

        With batch_invariant these have the bits of n steps.
        """
        if self.once:
            self._make_products(once=False)
        count = tokens.shape[1]
        positions = self.lengths[:, None] + torch.arange(count, device=tokens.device)
        if self.positions is not None:
            # a token beyond the last position is a guess that will be discarded
            positions.clamp_(max=self.positions.shape[0] - 1 - self.model.config.position_offset)
        x = self._embed(tokens, positions)  # (B, n, E)
        if self.invariant:
            attend = one_by_one([self._appending(self.lengths + i) for i in range(count)])
        else:
            attend = self._appending(self.lengths, count)
        logits = self._logits(self._through_blocks(x.flatten(0, 1), count, attend))
        self.lengths += count
        return logits.unflatten(0, tuple(tokens.shape))

    @torch.no_grad()
    def rewind(self, lengths: Tensor) -> None:
        """Keep the first tokens of each sequence only, `lengths` (B,) of them."""
        self.lengths.copy_(lengths)

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], (B,)."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        if not len(moved):
            return
        if self.sources is not None:
            self.sources.reorder(rows)
        source = rows[moved]
        self.lengths[moved] = self.lengths[source]
        held = int(self.lengths[moved].max())
        copy_sequences((buffer for layer in self.cache for buffer in layer), source, moved, held)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits at every position of sequences (B, S) as decoding computes them, (B, S, V); fills the caches."""
        check_range("input_ids", ids, self.model.config.vocab_size, "vocab_size")
        self.lengths.fill_(ids.shape[1])
        hidden = self._read(ids, slice(0, ids.shape[0]), self._positions_of(ids))
        return self._logits(hidden).unflatten(0, tuple(ids.shape))

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Tokens and their positions, of any shape that goes together, (..., E)."""
        config = self.model.config
        if offset := config.position_offset:
            positions = positions + offset
            if config.pad_token_id is not None:
                positions = torch.where(ids == config.pad_token_id, offset - 1, positions)
        x = F.embedding(ids, self.model.wte.weight)
        if config.scale_embedding:
            x = x * embedding_scale(config.n_embd, self.model.wte.weight.dtype)
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions)
        if self.model.wtt is not None:
            x = x + self.model.wtt.weight[0]
        return _norm(self.model.ln_emb, x)

    def _logits(self, x: Tensor) -> Tensor:
        """(N, E) -> (N, V)."""
        if self.transform is not None and self.model.lm_transform is not None:
            x = _norm(self.model.lm_transform.norm, self.transform(x))
        logits, cap = self.head(x), self.model.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _last(self, ids: Tensor, first_row: int, ends: Tensor | None, size: int) -> Tensor:
        """Read prompts (N, S), so many tokens at a time; the hidden state (N, E) at their ends (N,), or the last."""
        count, seqlen = ids.shape
        rows = slice(first_row, first_row + count)
        last = None
        positions = self._positions_of(ids)
        for start in range(0, seqlen, size):
            part, places = (each[..., start : start + size] for each in (ids, positions))
            x = self._read(part, rows, places, start).unflatten(0, tuple(part.shape))
            if ends is None:
                last = x[:, -1]
                continue
            inside = (ends - start).clamp(0, part.shape[1] - 1)
            here = x[torch.arange(count, device=x.device), inside]
            last = here if last is None else torch.where((ends >= start)[:, None], here, last)
        assert last is not None
        return last.contiguous()

    def _mostly_padding(self, ids: Tensor, lengths: Tensor | None) -> bool:
        """Whether reading the tokens alone pays; asked on a CPU only, as it waits for the lengths."""
        if self.sources is not None:  # cross-attention needs a row for each sequence
            return False
        return lengths is not None and ids.is_cpu and int(lengths.sum()) <= PACKED_SHARE * ids.numel()

    def _last_of_packed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Read prompts (N, S) as their T tokens, one prompt behind the other; the hidden state (N, E) at their ends."""
        seqlen = ids.shape[1]
        rows, places = (torch.arange(seqlen, device="cpu") < lengths[:, None]).nonzero(as_tuple=True)  # (T,)
        ends = lengths.cumsum(0)
        bounds = F.pad(ends, (1, 0)).int()
        tables = {kind: self._table(kind, places, lengths[rows]) for kind in self.rotary}

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if (table := tables.get(self.kinds[layer])) is not None:
                q, k = apply_rotary(q, table), apply_rotary(k, table)
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, D)
            keys, values = self.cache[layer]
            keys[rows, :, places] = k
            values[rows, :, places] = v
            out = attention_varlen(
                q, k, v, bounds, bounds, seqlen, seqlen, causal=True, window=attn.window, softcap=attn.softcap,
                alibi_slopes=attn.alibi_slopes, sinks=attn.sinks, scale=attn.scale, backend=attn.backend,
            )  # fmt: skip
            return out.transpose(0, 1)[None]  # (1, H, T, D)

        positions = self._positions_of(ids).expand_as(ids)[rows, places]
        x = self._through_blocks(self._embed(ids[rows, places], positions), len(rows), attend)
        return x[ends - 1]

    def _positions_of(self, ids: Tensor) -> Tensor:
        """Positions of whole prompts' tokens (N, S) before the offset, (N, S) or (S,), whichever parts are read."""
        return count_positions(ids, None, None, 0, self.model.config) - self.model.config.position_offset

    def _read(self, ids: Tensor, rows: slice, positions: Tensor, start: int = 0) -> Tensor:
        """The final hidden states of tokens (N, S) behind the first `start` ones of these rows, (N * S, E), whose keys
        and values go into the caches."""
        seqlen = ids.shape[1]
        held = slice(start, start + seqlen)
        before = self.lengths.new_full((ids.shape[0],), start)
        places = torch.arange(start, start + seqlen, device=ids.device)
        tables = {kind: self._table(kind, places, self.lengths[rows, None]) for kind in self.rotary}

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[layer]
            if (table := tables.get(self.kinds[layer])) is not None:
                q, k = apply_rotary(q, table), apply_rotary(k, table)
            if start:
                return _append(attn, (keys[rows], values[rows]), before, q, k, v, (None, None))
            keys[rows, :, held].copy_(k)
            values[rows, :, held].copy_(v)
            return attend_prompts(attn, q, k, v)

        return self._through_blocks(self._embed(ids, positions).flatten(0, 1), seqlen, attend, rows)

    def _table(self, kind: str, places: Tensor, lengths: Tensor) -> RotaryTable:
        """cos and sin at positions of prompts, whose lengths count under dynamic scaling."""
        rotary = self.model.rotary[kind]
        if rotary.scaling is not None and rotary.scaling.kind == "dynamic":
            return rotary.table(places, self.wide, lengths)
        cos, sin = self.rotary[kind]
        return cos[places], sin[places]

    def _appending(self, lengths: Tensor, count: int = 1) -> Attend:
        """The attention of `count` tokens behind each sequence."""
        if self.in_blocks or (self.masks and count == 1):
            invariant = self.in_blocks
            common = of_whole_caches(self.cache, lengths, self.rotary, self.kinds, invariant=invariant)
            if common is not None:
                return common

        def append(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            table = self.rotary.get(self.kinds[layer], (None, None))
            return _append(attn, self.cache[layer], lengths, q, k, v, table)

        return append

    def _through_blocks(
        self, x: Tensor, seqlen: int, attend: Attend, sequences: slice = slice(None)
    ) -> Tensor:
        """(B * S, E) -> (B * S, E): every block and the final norm, rows of one sequence after the other."""
        post_norm = self.model.config.post_norm

        def before(norm: nn.Module, x: Tensor) -> Tensor:
            return x if post_norm else _norm(norm, x)

        def added(norm: nn.Module, out_norm: nn.Module | None, x: Tensor, h: Tensor) -> Tensor:
            return _norm(norm, x + h) if post_norm else x + _norm(out_norm, h)

        for layer, block in enumerate(self.blocks):
            module, attn = block.module, block.module.attn
            heads, kv_heads, dim = attn.num_heads, attn.num_kv_heads, attn.head_dim
            qkv = block.qkv(before(module.ln_1, x)).view(
                x.shape[0] // seqlen, seqlen, heads + 2 * kv_heads, dim
            )
            q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)  # (B, heads, S, D)
            if attn.q_norm is not None and attn.k_norm is not None:
                q, k = attn.q_norm(q), attn.k_norm(k)
            out = attend(attn, layer, q, k, v).transpose(1, 2).reshape(x.shape[0], heads * dim)
            x = added(module.ln_1, module.ln_1_out, x, block.out(out))
            if self.sources is not None and block.cross_q is not None and block.cross_out is not None:
                assert module.ln_cross is not None
                out = self.sources.attend(layer, block.cross_q(before(module.ln_cross, x)), seqlen, sequences)
                x = added(module.ln_cross, None, x, block.cross_out(out))
            h = in_parts(block.mlp, before(module.ln_2, x), module.mlp.c_fc.weight.shape[0])
            x = added(module.ln_2, module.ln_2_out, x, h)
        return _norm(self.model.ln_f, x)

    def _make_products(self, *, once: bool) -> None:
        """The products with every weight: for a prompt, which may be all that is asked for, or for the steps after."""
        self.once = once
        self.blocks = [self._parts(block) for block in self.model.h]
        self.head = self._rows(self.model.lm_head.weight, self.model.lm_head.bias)
        self.transform: Rows | None = None
        if (head := self.model.lm_transform) is not None:
            self.transform = self._rows(head.dense.weight, head.dense.bias, head.activation)

    def _parts(self, block: Any) -> _Block:
        attn, mlp, cross = block.attn, block.mlp, block.cross_attn
        return _Block(
            block,
            self._rows(attn.in_proj_weight, attn.in_proj_bias),
            self._rows(attn.out_proj.weight, attn.out_proj.bias),
            self._rows(mlp.c_fc.weight, mlp.c_fc.bias, mlp.activation),
            self._rows(mlp.c_proj.weight, mlp.c_proj.bias),
            None if cross is None else self._rows(cross.q.weight, cross.q.bias),
            None if cross is None else self._rows(cross.out_proj.weight, cross.out_proj.bias),
        )

    def _rows(
        self, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None = None
    ) -> Rows:
        """The product with a weight, and an activation of it, as this decoder makes it."""
        then = None
        if activation is not None:
            then = Elementwise(by_row(activation) if self.invariant else activation, FUSED.get(activation))
        product = rows_of(weight, bias, self.model.quantized, once=self.once, then=then)
        # sums of 8-bit integers are exact in any order
        return InBlocks(product) if self.invariant and self.model.quantized is None else product


def _append(
    attn: MultiHeadAttention,
    cache: tuple[Tensor, Tensor],
    lengths: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Append keys and values (N, Hkv, S, D) to caches that hold `lengths` (N,) tokens; (N, H, S, D)."""
    return attention_kv_cache(
        q, *cache, lengths, key=k, value=v, rotary_cos=table[0], rotary_sin=table[1], window=attn.window,
        softcap=attn.softcap, alibi_slopes=attn.alibi_slopes, sinks=attn.sinks, scale=attn.scale,
        backend=attn.backend,
    )  # fmt: skip


def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):  # without the module's call, which looks for hooks
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight, norm.eps, unit_offset=norm.unit_offset)
    return x
