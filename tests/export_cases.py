"""Calls and models that the tests of export share, and how their graphs are looked at."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from numerics import assert_within_rule, plain_in_any_order

B, H, HKV, L, S, D = 2, 4, 2, 5, 7, 8
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chance(p: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < p


def qkv(
    dtype: torch.dtype = torch.float64, *, same: bool = False, batch: int = B, more: int = 0
) -> list[Tensor]:
    lengths = (S + more, S + more, S + more) if same else (L + more, S + more, S + more)
    return [
        randn(batch, heads, n, D, seed=i, dtype=dtype)
        for i, (heads, n) in enumerate(zip((H, HKV, HKV), lengths))
    ]


def results_of(function: Callable[..., Any], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Results and the gradients of all operands under the same upstream gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    used = [torch.where(r.isfinite(), r, 0) for r in results]
    total = sum((u * randn(*u.shape, seed=9).to(u.dtype)).sum() for u in used)
    return [*results, *torch.autograd.grad(total, leaves)]


class Calls(nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *operands: Tensor) -> Any:
        return self.call(*operands)


def targets(graph: Any) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def foreign(graph: Any) -> list[str]:
    return [str(target) for target in targets(graph) if "fastattn" in str(target)]


EXPORTED: dict[str, tuple[Callable[..., Any], bool]] = {  # and whether torch's own attention expresses it
    "plain": (lambda q, k, v: fastattn.attention(q, k, v), True),
    "causal": (lambda q, k, v: fastattn.attention(q, k, v, causal=True), True),
    "top left": (lambda q, k, v: fastattn.attention(q, k, v, causal="top_left"), True),
    "window": (lambda q, k, v: fastattn.attention(q, k, v, window=(3, 0)), True),
    "lengths": (lambda q, k, v: fastattn.attention(q, k, v, key_lengths=torch.full((B,), 3)), True),
    "bias": (lambda q, k, v: fastattn.attention(q, k, v, bias=q.amax(-1)[..., None]), True),
    "lse": (lambda q, k, v: fastattn.attention(q, k, v, return_lse=True), False),
    "softcap": (lambda q, k, v: fastattn.attention(q, k, v, softcap=3.0), False),
    "weights": (lambda q, k, v: fastattn.attention(q, k, v, return_weights="mean", causal=True), False),
    "sdpa": (
        lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        True,
    ),
    "varlen": (
        lambda q, k, v: fastattn.attention_varlen(
            *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), *(torch.tensor([0, 3, 8]).int(),) * 2
        ),
        True,
    ),
    "cache": (lambda q, k, v: fastattn.attention_kv_cache(q, k, v, torch.full((B,), 5).int()), True),
    "softmax": (lambda q, k, v: fastattn.softmax(q, causal=True), False),
    "losses": (
        lambda q, k, v: (
            fastattn.cross_entropy(q[0, 0], torch.zeros_like(q[0, 0, :, 0]).long())
            + fastattn.linear_cross_entropy(q[0, 0], q.new_ones(3, D), torch.zeros_like(q[0, 0, :, 0]).long())
        ),
        False,
    ),
}


class Encoder(nn.Module):
    """Embeds nothing, attends with padding: what people export."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layers(x, src_key_padding_mask=padding)


def encoder(swapped: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Encoder().eval().to(dtype)
    if swapped:
        assert len(fastattn.swap_attention(model).swapped) == 2
    return model


def padded(batch: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    padding = torch.arange(length) >= torch.tensor([length, length - 3, 1, length - 1])[:batch, None]
    return randn(batch, length, 32, dtype=dtype), padding


def assert_as_exact(actual: Any, batch: int, length: int) -> None:
    x, padding = padded(batch, length)
    with torch.no_grad():
        golden = encoder(swapped=False, dtype=torch.float64)(x.double(), padding)
        theirs = plain_in_any_order(partial(encoder(swapped=False), x, padding), golden)
    assert_within_rule(torch.as_tensor(actual), theirs, golden)
