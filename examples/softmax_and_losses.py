"""softmax, cross_entropy and linear_cross_entropy in the place of torch's, and what they do beyond those."""

import torch
import torch.nn.functional as F

import fastattn

torch.manual_seed(0)
scores = torch.randn(4, 16, 24)
torch.testing.assert_close(fastattn.softmax(scores), F.softmax(scores, dim=-1))

# a mask and causality without a masked copy; a row that keeps nothing is 0, not NaN
mask = torch.rand(4, 16, 24) > 0.3
mask[0, 3] = False
weights = fastattn.softmax(scores, mask=mask, causal=True, scale=0.5)
assert weights[0, 3].abs().sum() == 0
assert not weights.isnan().any()

logits = torch.randn(64, 1000, requires_grad=True)
target = torch.randint(0, 1000, (64,))
target[:5] = -100
options = {"label_smoothing": 0.1, "ignore_index": -100}
ours, theirs = fastattn.cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options)
torch.testing.assert_close(ours, theirs)
gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
torch.testing.assert_close(*gradients)

# the last layer and the loss in one: the logits, (tokens, vocabulary), never exist as a whole
hidden, head = torch.randn(64, 32, requires_grad=True), torch.randn(1000, 32, requires_grad=True)
fused = fastattn.linear_cross_entropy(hidden, head, target)
plain = F.cross_entropy(hidden @ head.T, target)
torch.testing.assert_close(fused, plain)
torch.testing.assert_close(
    torch.autograd.grad(fused, (hidden, head)),
    torch.autograd.grad(plain, (hidden, head)),
    rtol=1e-4,
    atol=1e-6,
)
print(
    f"cross-entropy {ours.item():.4f}, torch's {theirs.item():.4f}; fused with the layer {fused.item():.4f}"
)
