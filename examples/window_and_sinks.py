"""Causal sliding-window attention with a learned sink per head, checked against the formula in float64."""

import torch

import fastattn

torch.manual_seed(0)
query = torch.randn(1, 8, 256, 32, requires_grad=True)  # (batch, heads, length, head dim)
key, value = (torch.randn(1, 2, 256, 32, requires_grad=True) for _ in range(2))  # four query heads share each
sinks = torch.zeros(8, requires_grad=True)

# each query sees itself and the 63 keys before it
out, lse = fastattn.attention(query, key, value, causal=True, window=(63, 0), sinks=sinks, return_lse=True)
out.square().sum().backward()

doubles = [tensor.detach().double().requires_grad_() for tensor in (query, key, value, sinks)]
expected = fastattn.reference.attention(*doubles[:3], causal=True, window=(63, 0), sinks=doubles[3])
expected.square().sum().backward()
torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(sinks.grad.double(), doubles[3].grad, rtol=1e-4, atol=1e-4)

share = (sinks[:, None] - lse[0]).exp()  # of the softmax that goes to the sink, (heads, length)
print("share of the sink, first query and last:", share[0, 0].item(), share[0, -1].item())
assert share[:, 0].mean() > share[:, -1].mean()  # a sink beside one key weighs more than beside 64
