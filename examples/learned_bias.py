"""A relative position bias learned by gradient, of a shape that is never expanded, checked against float64."""

import torch

import fastattn

torch.manual_seed(0)
length, heads = 96, 4
query, key, value = torch.randn(3, 2, heads, length, 32).unbind()
table = (0.1 * torch.randn(heads, 2 * length - 1)).requires_grad_()  # one number per head and distance
position = torch.arange(length)
distance = position[:, None] - position + length - 1


def loss(attention, table, *qkv):
    bias = table[:, distance]  # (heads, length, length); the batch dimension is broadcast
    return attention(*qkv, bias=bias, causal=True).square().sum()


(gradient,) = torch.autograd.grad(loss(fastattn.attention, table, query, key, value), table)
double = table.detach().double().requires_grad_()
inputs = [tensor.double() for tensor in (query, key, value)]
(expected,) = torch.autograd.grad(loss(fastattn.reference.attention, double, *inputs), double)

error = (gradient.double() - expected).abs().max().item()
print(f"gradient {tuple(gradient.shape)}, largest {expected.abs().max().item():.3g}, error {error:.1e}")
assert error < 1e-5 * expected.abs().max().item()
assert gradient[:, length:].abs().sum() > 0
assert gradient[:, : length - 1].abs().sum() == 0  # later keys, which a causal query never sees
