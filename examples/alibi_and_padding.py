"""ALiBi with a padded batch: padding may hold NaN and changes nothing, and the slopes have a gradient."""

import torch

import fastattn
from fastattn.nn.positions import alibi_slopes

torch.manual_seed(0)
lengths = torch.tensor([100, 37])
query, key, value = torch.randn(3, 2, 8, 100, 32).unbind()
slopes = alibi_slopes(8).requires_grad_()

key[1, :, 37:] = float("nan")  # whatever padding holds
value[1, :, 37:] = float("nan")
out = fastattn.attention(query, key, value, causal="top_left", key_lengths=lengths, alibi_slopes=slopes)
out[1, :, :37].sum().backward()
assert torch.isfinite(out).all()
assert torch.isfinite(slopes.grad).all()

alone = [tensor[1:, :, :37] for tensor in (query, key, value)]
expected = fastattn.attention(*alone, causal=True, alibi_slopes=slopes)
torch.testing.assert_close(out[1:, :, :37], expected)
(gradient,) = torch.autograd.grad(expected.sum(), slopes)
torch.testing.assert_close(slopes.grad, gradient, rtol=1e-4, atol=1e-4)
print("the padded text gives what it gives alone; gradient of the slopes:", slopes.grad.tolist())
