"""Decode token by token against a paged cache with rotary positions, equal to attention over the whole text."""

import torch

import fastattn
from fastattn.nn.positions import Rotary, apply_rotary

torch.manual_seed(0)
batch, heads, kv_heads, dim, page, steps = 2, 8, 2, 32, 16, 40
pages_per_sequence = -(-steps // page)
k_cache, v_cache = torch.zeros(2, batch * pages_per_sequence, kv_heads, page, dim).unbind()

# page i of sequence b is k_cache[block_table[b, i]]; any order, and not two sequences on a page that is written
block_table = torch.randperm(batch * pages_per_sequence).view(batch, -1).to(torch.int32)
cos, sin = Rotary(dim).table(torch.arange(steps))
cache_lengths = torch.zeros(batch, dtype=torch.int32)

query = torch.randn(batch, heads, steps, dim)
key, value = torch.randn(2, batch, kv_heads, steps, dim).unbind()
decoded = []
for step in range(steps):
    new = slice(step, step + 1)
    decoded.append(
        fastattn.attention_kv_cache(
            query[:, :, new], k_cache, v_cache, cache_lengths, key=key[:, :, new], value=value[:, :, new],
            block_table=block_table, rotary_cos=cos, rotary_sin=sin,
        )
    )  # fmt: skip
    cache_lengths += 1  # the call appends keys and values; counting them is the caller's

rotated = [apply_rotary(tensor, (cos, sin)) for tensor in (query, key)]
expected = fastattn.attention(*rotated, value, causal=True)
torch.testing.assert_close(torch.cat(decoded, dim=2), expected, rtol=1e-4, atol=1e-5)
print(f"{steps} steps over {k_cache.shape[0]} pages of {page} keys; block table {block_table.tolist()}")
