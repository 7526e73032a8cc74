"""Code that calls torch's scaled_dot_product_attention runs on fastattn inside a with block, unchanged."""

import torch
import torch.nn.functional as F

import fastattn


class Block(torch.nn.Module):
    """A layer that somebody else wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


of_torch = F.scaled_dot_product_attention
torch.manual_seed(0)
block = Block()
x = torch.randn(2, 50, 64, requires_grad=True)
(expected_gradient,) = torch.autograd.grad(block(x).square().sum(), x)

with fastattn.sdpa_override() as override:
    out = block(x)
(gradient,) = torch.autograd.grad(out.square().sum(), x)

assert override.calls == 1
torch.testing.assert_close(out, block(x))
torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
assert F.scaled_dot_product_attention is of_torch  # again
print(f"{override.calls} call ran on fastattn, with torch's result and gradient")
