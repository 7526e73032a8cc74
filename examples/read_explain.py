"""Ask which backend would run a call, for the forward and the backward, and why each other one would not."""

import torch

import fastattn

query = torch.randn(1, 8, 128, 64, requires_grad=True)
key, value = torch.randn(2, 1, 2, 128, 64).unbind()

explanation = fastattn.explain(query, key, value, causal=True, window=(31, 0))
print(explanation)
plain_types = explanation.to_dict()
assert plain_types["backend"] == "torch"  # on a CPU
assert plain_types["backward"] == "torch"
assert set(plain_types["refusals"]) == {"cuda", "triton"}

# without a gradient there is no backward to explain
assert fastattn.explain(query.detach(), key, value).backward is None

# a backend asked for by name never gives way silently
try:
    fastattn.attention(query, key, value, backend="cuda")
except RuntimeError as error:
    print(f"\nbackend='cuda': {error}")
else:
    raise AssertionError("a CPU has no CUDA kernels")
