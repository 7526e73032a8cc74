"""Tensors of a device give the same results whatever torch.set_default_device says, as where it says "cuda".

Here the default is "meta", whose tensors hold no values, so that one made without a device fails or shows.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.models import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("package", ["fastattn", "kernels"])
def test_every_tensor_names_its_device(package: str) -> None:
    nameless = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = {"device", "out", None} & {keyword.arg for keyword in node.keywords}
            if of_torch and node.func.attr in FACTORIES and not named:
                nameless.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not nameless, "\n".join(nameless)


def made(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu")


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (4, 3)},
    "dropout": {"dropout_p": 0.2, "dropout_seed": 3},
    "mask": {"mask": made(24, 24) > -1},
    "bias": {"bias": made(4, 24, 24)},
    "ALiBi": {"alibi_slopes": made(4).abs()},
    "lengths": {"key_lengths": torch.tensor([5, 24])},
    "segments": {"segment_ids": torch.arange(48).view(2, 24) // 7},
    "segments, dropout": {"segment_ids": torch.arange(48).view(2, 24) // 7, "dropout_p": 0.2, "dropout_seed": 3},
    "sinks": {"sinks": made(4)},
    "softcap": {"softcap": 5.0},
    "16 bits": {"query": made(2, 4, 24, 16).bfloat16()},
}  # fmt: skip


def attention(name: str) -> list[Tensor]:
    query, key, value = (made(2, 4, 24, 16) for _ in range(3))
    options = dict(ATTENTION[name])
    dtype = options.pop("query", query).dtype
    return with_gradients(fastattn.attention, *(t.to(dtype) for t in (query, key, value)), **options)


def varlen(**options: Any) -> list[Tensor]:
    starts = torch.tensor([0, 5, 24], dtype=torch.int32, device="cpu")
    tensors = (made(24, 4, 16) for _ in range(3))
    return with_gradients(
        lambda *t: fastattn.attention_varlen(*t, starts, starts, 19, 19, **options), *tensors
    )


def labels(count: int, classes: int) -> Tensor:
    return torch.arange(count, device="cpu") % classes


def module(padded: bool) -> list[Tensor]:
    torch.manual_seed(0)
    layer = fastattn.MultiHeadAttention(32, 4, dropout=0.1, batch_first=True, device="cpu")
    mask = torch.arange(6, device="cpu").expand(2, 6) > 3 if padded else None
    torch.manual_seed(1)
    return with_gradients(lambda x: layer(x, x, x, key_padding_mask=mask)[0], made(2, 6, 32))


def model() -> GPT:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.1))


def training(padded: bool) -> list[Tensor]:
    decoder, ids = model(), labels(18, 50).view(2, 9)
    mask = (torch.arange(9, device="cpu") >= torch.tensor([[3], [0]], device="cpu")).long()
    torch.manual_seed(1)
    loss = decoder(ids, labels=ids, attention_mask=mask if padded else None).loss
    return [loss.detach(), *torch.autograd.grad(loss, [*decoder.parameters()])]


def generating(**options: Any) -> list[Tensor]:
    decoder, ids = model().eval(), labels(18, 50).view(2, 9)
    return [decoder.generate(ids, max_new_tokens=6, **options)]


LEFT_PADDED = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
CASES: dict[str, Callable[[], list[Tensor]]] = {
    **{f"attention, {name}": lambda name=name: attention(name) for name in ATTENTION},  # type: ignore[misc]
    "varlen": varlen,
    "varlen, causal with dropout": lambda: varlen(causal=True, dropout_p=0.1, dropout_seed=3),
    "softmax": lambda: with_gradients(fastattn.softmax, made(3, 5)),
    "cross_entropy": lambda: with_gradients(lambda x: fastattn.cross_entropy(x, labels(6, 9)), made(6, 9)),
    "linear_cross_entropy": lambda: with_gradients(
        lambda x, w: fastattn.linear_cross_entropy(x, w, labels(6, 9)), made(6, 8), made(9, 8)
    ),
    "module": lambda: module(False),
    "module, padded": lambda: module(True),
    "training": lambda: training(False),
    "training, padded": lambda: training(True),
    "greedy": generating,
    "sampled": lambda: generating(do_sample=True, temperature=0.8, top_k=5, seed=1),
    "beams": lambda: generating(num_beams=3),
    "padded prompts": lambda: generating(attention_mask=LEFT_PADDED),
    "batch_invariant": lambda: generating(batch_invariant=True),
    "prompt lookup": lambda: generating(prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_the_default_device(name: str) -> None:
    expected = CASES[name]()
    with torch.device("meta"):
        found = CASES[name]()
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
