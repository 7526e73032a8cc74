"""Steps of a GPT over pages of keys and values, which sequences take as they grow and may share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models.appending import Attend, InBlocksOfKeys, attend_prompts, one_by_one, suits
from fastattn.models.decodable import Decodable, can_decode
from fastattn.models.steps import GPTDecoder
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.positions import apply_rotary, positions_of_tokens
from fastattn.nn.rows import INVARIANT_ROWS, InBlocks, Rows, aligned
from fastattn.ops.kv_cache import attention_kv_cache

LARGE_BLOCKS = (16, 32, 64)  # rows
CHUNK_SIZE = 16  # tokens of a prompt that are read at a time; a page where that is no multiple


class InLargeBlocks(InBlocks):
    """`InBlocks`, but with larger blocks for more rows, which read the weight once for all of them.

    For products that give a row the same bits in a block of any of these sizes (`blocks_that_agree`).
    """

    def __init__(self, product: Rows, sizes: tuple[int, ...]) -> None:
        super().__init__(product)
        self.sizes = sizes

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        count, start = x.shape[0], 0
        parts: list[Tensor] = []
        if count <= INVARIANT_ROWS.get(x.dtype, 1):
            return super().__call__(x)
        while start < count:
            size = next((size for size in self.sizes if size >= count - start), self.sizes[-1])
            part = x[start : start + size]
            missing = size - part.shape[0]
            parts.append(self.product(F.pad(part, (0, 0, 0, missing)) if missing else aligned(part)))
            start += size
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count]


def blocks_that_agree(product: Rows, weight: Tensor) -> tuple[int, ...]:
    """The sizes of LARGE_BLOCKS in which a product with a weight (O, I) has the bits of small blocks, tried with random
    rows.

    An order of summation is a matter of shapes, threads and the machine, not of values; another order rounds some of
    many random sums differently.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(LARGE_BLOCKS[-1], weight.shape[1], generator=generator, device="cpu").to(weight)
    small = InBlocks(product)(rows)
    return tuple(size for size in LARGE_BLOCKS if torch.equal(product(rows[:size].clone()), small[:size]))


class Part(NamedTuple):
    """Tokens of a prompt that are read in one pass: from a multiple of `chunk_size` on."""

    ids: Tensor  # (S,)
    start: int  # tokens before them
    table: Tensor  # (1, pages) int32, the sequence's pages up to the end of this part at least
    length: int  # tokens of the whole prompt
    past: int  # of the tokens before them, those that positions count


class PagedDecoder(GPTDecoder):
    """The steps of a `GPTDecoder` whose caches are pages (P, Hkv, page, D); the caller says which pages are whose.

    With batch_invariant a sequence has the bits that `generate` gives it alone with a prefill_chunk_size of
    `chunk_size`: a prompt is read in parts of so many tokens, so that what a page holds depends on the tokens up to its
    end only.

    Args:
        model: a GPT without replaced modules or hooks.
        pages: how many there are.
        page_size: tokens of a page. On a CPU those of 64, or a multiple, are read where they lie.
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
        # by a weight's shape and dtype, and the activation that follows
        self._agreeing: dict[tuple[Any, ...], tuple[int, ...]] = {}
        super().__init__(model, pages, page_size, batch_invariant=batch_invariant)
        if self.once:
            self._make_products(once=False)
        # also where bits may differ: the backend would copy the pages of each sequence by operations of its own
        self.in_blocks = self.lengths.is_cpu and all(suits(block.module.attn) for block in self.blocks)
        self.page_size, self.max_length = page_size, max_length
        self.chunk_size = page_size if page_size % CHUNK_SIZE else CHUNK_SIZE
        self._make_positions(max_length)

    def _room_for(self, capacity: int) -> int:
        return capacity

    def _rows(
        self, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None = None
    ) -> Rows:
        made = super()._rows(weight, bias, activation)
        if not isinstance(made, InBlocks):
            return made
        kind = (weight.shape, weight.dtype, activation)
        if kind not in self._agreeing:
            self._agreeing[kind] = blocks_that_agree(made.product, weight)
        sizes = self._agreeing[kind]
        return InLargeBlocks(made.product, sizes) if sizes else made

    @property
    def keys_depend_on_length(self) -> bool:
        """Whether the keys of a prompt depend on its length, as under dynamic rotary scaling: pages are not shared."""
        scalings = (rotary.scaling for rotary in self.model.rotary.values())
        return any(scaling is not None and scaling.kind == "dynamic" for scaling in scalings)

    @torch.no_grad()
    def run(self, parts: Sequence[Part], tokens: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        """Read parts of prompts and append a token to each of N other sequences, in one pass over the weights.

        Args:
            parts: of different sequences.
            tokens: (N,).
            lengths: (N,) int32, tokens that each of these sequences holds.
            table: (N, pages) int32, with the page that each new token goes to, which no other sequence has.

        Returns:
            Final hidden states (S of every part, then N, E).
        """
        count = tokens.shape[0]
        ids = torch.cat([*(part.ids for part in parts), tokens])
        positions = torch.cat([*(self._positions(part) for part in parts), lengths.to(ids.dtype)])
        readers = [self._reader(part) for part in parts]
        append = self._appender(lengths, table) if count else None

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outs: list[Tensor] = []
            start = 0
            for part, reader in zip(parts, readers):
                rows = slice(start, start + part.ids.shape[0])
                outs.append(reader(attn, layer, q[:, :, rows], k[:, :, rows], v[:, :, rows]))
                start = rows.stop
            if append is not None:
                q, k, v = (x[:, :, start:].transpose(0, 2) for x in (q, k, v))  # (N, heads, 1, D)
                outs.append(append(attn, layer, q, k, v).transpose(0, 2))
            return outs[0] if len(outs) == 1 else torch.cat(outs, 2)  # (1, H, S + N, D)

        return self._through_blocks(self._embed(ids, positions), ids.shape[0], attend)

    def part(self, prompt: Sequence[int], start: int, stop: int, table: Tensor) -> Part:
        """The tokens of a prompt from `start` to `stop`, whose pages are those of `table` (1, pages) int32."""
        config, past = self.model.config, start
        if config.position_offset and config.pad_token_id is not None:
            past -= sum(token == config.pad_token_id for token in prompt[:start])
        ids = torch.tensor(list(prompt[start:stop]), dtype=torch.int64, device=table.device)
        return Part(ids, start, table, len(prompt), past)

    @torch.no_grad()
    def append(self, tokens: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        """Append a token to each of N sequences, (N,), as `run` does; logits of the token after it, (N, V)."""
        return self._logits(self.run((), tokens, lengths, table))

    def _positions(self, part: Part) -> Tensor:
        """(S,)"""
        config = self.model.config
        if config.position_offset:
            made = positions_of_tokens(part.ids[None], config.pad_token_id, 0, part.past)
            return made.flatten()
        return torch.arange(part.start, part.start + part.ids.shape[0], device=part.ids.device)

    def _reader(self, part: Part) -> Attend:
        """The attention of a part of a prompt, a chunk at a time, which writes its keys and values to the pages."""
        start, stop = part.start, part.start + part.ids.shape[0]
        places = torch.arange(start, stop, device=part.ids.device)
        lengths = torch.tensor([[part.length]], dtype=torch.int32, device=places.device)
        tables = {kind: self._table(kind, places, lengths) for kind in self.rotary}
        first_page = part.table[0, :1].long()
        edges = [*range(start, stop, self.chunk_size), stop]
        before = [torch.tensor([edge], dtype=torch.int32, device=places.device) for edge in edges[:-1]]

        def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if (rotation := tables.get(self.kinds[layer])) is not None:
                q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
            outs = []
            for number, edge in enumerate(edges[:-1]):
                chunk = slice(edge - start, edges[number + 1] - start)
                q_c, k_c, v_c = (x[:, :, chunk] for x in (q, k, v))
                if edge:
                    outs.append(
                        self._append(attn, layer, before[number], q_c, k_c, v_c, part.table, (None, None))
                    )
                    continue
                for cache, new in zip(self.cache[layer], (k_c, v_c)):
                    cache[first_page, :, : new.shape[2]] = new  # no chunk goes over the end of a page
                outs.append(attend_prompts(attn, q_c, k_c, v_c))
            return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

        return attend

    def _appender(self, lengths: Tensor, table: Tensor) -> Attend:
        """The attention of a token behind each of N sequences, whose keys and values go to the pages."""
        if self.in_blocks:
            return InBlocksOfKeys(self.cache, lengths, table, self.rotary, self.kinds)

        def paged(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rotation = self.rotary.get(self.kinds[layer], (None, None))
            return self._append(attn, layer, lengths, q, k, v, table, rotation)

        return paged

    @torch.no_grad()
    def append_several(self, tokens: Tensor, start: int, table: Tensor) -> None:
        """Append tokens (n,) to one sequence that holds `start`, with the bits of n calls of `append`."""
        before = torch.tensor([start], dtype=torch.int32, device=tokens.device)
        if self.invariant or self.in_blocks:
            attend = one_by_one([self._appender(before + i, table) for i in range(len(tokens))])
        else:
            attend = self._appender(before, table)
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
