"""Steps of a GPT over pages of keys and values, which sequences take as they grow and may share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.models.decodable import Decodable, can_decode
from fastattn.models.steps import GPTDecoder, attend_prompts
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.positions import apply_rotary, positions_of_tokens
from fastattn.nn.rows import InBlocks, Rows
from fastattn.ops.kv_cache import attention_kv_cache

LARGE_BLOCK = 16  # rows


class InLargeBlocks(InBlocks):
    """`InBlocks`, but with blocks of LARGE_BLOCK rows first, which read the weight once for all of them.

    For products that give a row the same bits in a block of either size (`blocks_agree`).
    """

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        whole = x.shape[0] // LARGE_BLOCK * LARGE_BLOCK
        if not whole:
            return super().__call__(x)
        parts = [self.product(part.clone()) for part in x[:whole].split(LARGE_BLOCK)]
        if whole < x.shape[0]:
            parts.append(super().__call__(x[whole:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def blocks_agree(product: Rows, weight: Tensor) -> bool:
    """Whether a product with a weight (O, I) has the same bits in blocks of both sizes, tried with random rows.

    An order of summation is a matter of shapes, threads and the machine, not of values; another order rounds some of
    LARGE_BLOCK * O random sums differently.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(LARGE_BLOCK, weight.shape[1], generator=generator).to(weight)
    return torch.equal(product(rows.clone()), InBlocks(product)(rows))


class PagedDecoder(GPTDecoder):
    """The steps of a `GPTDecoder` whose caches are pages (P, Hkv, page, D); the caller says which pages are whose.

    With batch_invariant a sequence has the bits that `generate` gives it alone with a prefill_chunk_size of one page:
    a prompt is read a page at a time, so that what a page holds depends on the tokens up to its end only.

    Args:
        model: a GPT without replaced modules or hooks.
        pages: how many there are.
        page_size: tokens of a page.
        max_length: most tokens of a sequence.

    Raises:
        ValueError: the model's modules were replaced or have hooks, or it needs an encoder's output.
    """

    def __init__(
        self,
        model: Decodable,
        pages: int,
        page_size: int,
        max_length: int,
        *,
        batch_invariant: bool = False,
    ) -> None:
        if not can_decode(model) or model.config.add_cross_attention:
            raise ValueError(
                "model: a GPT with replaced modules, hooks or cross-attention has no paged steps"
            )
        super().__init__(model, pages, page_size, batch_invariant=batch_invariant)
        if self.once:
            self._make_products(once=False)
        self.page_size, self.max_length = page_size, max_length
        self._make_positions(max_length)

    def _rows(self, weight: Tensor, bias: Tensor | None) -> Rows:
        made = super()._rows(weight, bias)
        if isinstance(made, InBlocks) and blocks_agree(made.product, weight):
            return InLargeBlocks(made.product)
        return made

    @property
    def keys_depend_on_length(self) -> bool:
        """Whether the keys of a prompt depend on its length, as under dynamic rotary scaling: pages are not shared."""
        scalings = (rotary.scaling for rotary in self.model.rotary.values())
        return any(scaling is not None and scaling.kind == "dynamic" for scaling in scalings)

    @torch.no_grad()
    def read(self, ids: Tensor, start: int, table: Tensor, length: int) -> Tensor:
        """Read a part of a prompt, (1, S) ids from position `start` on; their final hidden states (S, E).

        Args:
            table: (1, pages) int32, the sequence's pages up to the end of this part at least.
            length: tokens of the whole prompt.
        """
        seqlen, device = ids.shape[1], ids.device
        places = torch.arange(start, start + seqlen, device=device)
        before = torch.tensor([start], dtype=torch.int32, device=device)
        lengths = torch.tensor([[length]], dtype=torch.int32, device=device)
        tables = {kind: self._table(kind, places, lengths) for kind in self.rotary}
        blocks, inside = table[0, places // self.page_size].long(), places % self.page_size

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if (rotation := tables.get(self.kinds[layer])) is not None:
                q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
            if start:
                return self._append(attn, layer, before, q, k, v, table, (None, None))
            keys, values = self.cache[layer]
            keys[blocks, :, inside] = k[0].transpose(0, 1)
            values[blocks, :, inside] = v[0].transpose(0, 1)
            return attend_prompts(attn, q, k, v)

        config, positions = self.model.config, places
        if config.position_offset:
            positions = positions_of_tokens(ids, config.pad_token_id, 0, start)
        return self._through_blocks(self._embed(ids, positions).flatten(0, 1), seqlen, attend)

    @torch.no_grad()
    def append(self, tokens: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        """Append a token to each of N sequences, (N,); logits of the token after it, (N, V).

        Args:
            lengths: (N,) int32, tokens that each sequence holds.
            table: (N, pages) int32, with the page that each new token goes to, which no other sequence has.
        """

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rotation = self.rotary.get(self.kinds[layer], (None, None))
            return self._append(attn, layer, lengths, q, k, v, table, rotation)

        return self._logits(self._through_blocks(self._embed(tokens, lengths), 1, attend))

    @torch.no_grad()
    def append_several(self, tokens: Tensor, start: int, table: Tensor) -> None:
        """Append tokens (n,) to one sequence that holds `start`, with the bits of n calls of `append`."""
        before = torch.tensor([start], dtype=torch.int32, device=tokens.device)

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rotation = self.rotary.get(self.kinds[layer], (None, None))
            if not self.invariant:
                return self._append(attn, layer, before, q, k, v, table, rotation)
            outs = []
            for i in range(q.shape[2]):
                q_i, k_i, v_i = (x[:, :, i : i + 1] for x in (q, k, v))
                outs.append(self._append(attn, layer, before + i, q_i, k_i, v_i, table, rotation))
            return torch.cat(outs, 2)

        positions = torch.arange(start, start + len(tokens), device=tokens.device)
        self._through_blocks(self._embed(tokens, positions), len(tokens), attend)

    @torch.no_grad()
    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of final hidden states (N, E)."""
        return self._logits(hidden)

    @torch.no_grad()
    def copy_page(self, source: int, target: int) -> None:
        """Copy what a page holds to another one."""
        for keys, values in self.cache:
            keys[target] = keys[source]
            values[target] = values[source]

    def _append(
        self,
        attn: MultiHeadAttention,
        layer: int,
        lengths: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        rotation: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        return attention_kv_cache(
            q, *self.cache[layer], lengths, key=k, value=v, block_table=table, rotary_cos=rotation[0],
            rotary_sin=rotation[1], window=attn.window, softcap=attn.softcap, alibi_slopes=attn.alibi_slopes,
            sinks=attn.sinks, scale=attn.scale, backend=attn.backend,
        )  # fmt: skip
