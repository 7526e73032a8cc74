"""Swap attention in a transformers model: the same logits and gradients, and a report of what was swapped."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastattn

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()  # random weights; from_pretrained(...) works the same
ids = torch.randint(3, 100, (2, 16))
padding = torch.ones_like(ids)
padding[1, :5] = 0  # the second text is padded on the left


def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(ids, attention_mask=padding).logits[padding.bool()]
    weight = model.model.layers[0].self_attn.q_proj.weight
    return logits, torch.autograd.grad(logits.square().sum(), weight)[0]


before = logits_and_gradient()
print(fastattn.swap_attention(model))
after = logits_and_gradient()
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)

tokens = model.generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False, pad_token_id=0)
restored = fastattn.restore_attention(model)
expected = model.generate(ids, attention_mask=padding, max_new_tokens=5, do_sample=False, pad_token_id=0)
assert torch.equal(tokens, expected)
print(f"logits, gradients and {tokens.shape[1] - ids.shape[1]} new tokens agree; put back: {restored}")
