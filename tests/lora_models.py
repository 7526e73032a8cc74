"""Models of every kind that adapters are attached to in tests."""

import torch
from small_models import BERT, GPT2
from torch import nn

from fastattn import MultiHeadAttention
from fastattn.models import GPT, BertConfig, BertForSequenceClassification, GPTConfig
from fastattn.models.lora import adapters_of
from fastattn.nn.linear import Linear

LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8}
IDS = torch.arange(18).view(2, 9) * 3


class Mixed(nn.Module):
    """Linear layers of every kind, outside any family."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = Linear(8, 8, bias=False)
        self.attn = MultiHeadAttention(8, 4, batch_first=True, num_kv_heads=2)
        self.cross = MultiHeadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.cross(x, x[:, :3], x[:, :3], need_weights=False)[0]


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "gpt":
        model = GPT(GPTConfig(**GPT2))
    elif kind == "own":
        model = GPT(GPTConfig(**GPT2, positions="rotary", num_kv_heads=2, qk_norm=True))
    elif kind == "llama":
        family = next(f for f in GPT.families if f.model_type == "llama")
        model = GPT(family.read_config({"model_type": "llama", **LLAMA}))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**BERT))
    else:
        model = Mixed()
    return model.to(dtype).eval()


def run(model):
    if isinstance(model, Mixed):
        torch.manual_seed(5)
        return model(torch.randn(2, 9, 8).to(next(model.parameters()).dtype))
    return model(IDS).logits


def filled(model, std=0.2):
    """Random adapters, which begin as zeros."""
    torch.manual_seed(1)
    for adapter in adapters_of(model):
        adapter.lora_A.data.normal_(0, std)
        adapter.lora_B.data.normal_(0, std)
    return model
