"""Three documents without padding: segment ids in a dense row, and cu_seqlens, give what each document gives alone."""

import torch

import fastattn

torch.manual_seed(0)
lengths = [50, 7, 103]
total, heads, dim = sum(lengths), 4, 32
query, key, value = torch.randn(3, 1, heads, total, dim).unbind()

# one row of the batch that holds all three, with the document of every token
ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
in_a_row = fastattn.attention(query, key, value, causal=True, segment_ids=ids)

# no batch dimension at all: (tokens, heads, head dim) and where each document starts
starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
out = fastattn.attention_varlen(*packed, starts, starts, max(lengths), max(lengths), causal=True)

for start, length in zip(starts.tolist(), lengths):
    alone = [tensor[:, :, start : start + length] for tensor in (query, key, value)]
    expected = fastattn.attention(*alone, causal=True)
    torch.testing.assert_close(in_a_row[:, :, start : start + length], expected)
    torch.testing.assert_close(out[start : start + length].transpose(0, 1), expected[0])
pairs = sum(n * (n + 1) // 2 for n in lengths)
print(
    f"{len(lengths)} documents, {pairs} of {total * (total + 1) // 2} causal pairs visible: the same results"
)
