"""FLOPs of attention as torch's counter sees them, whichever of the two is imported first."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn


def test_pairs_count_as_torch_counts_them() -> None:
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    key = torch.randn(2, 2, 24, 8, requires_grad=True)
    value = torch.randn(2, 2, 24, 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = fastattn.attention(query, key, value, causal=True)
    forward = 2 * 2 * 4 * 16 * 24 * (8 + 12)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    backward = 2 * 4 * 16 * 24 * 2 * (3 * 8 + 2 * 12)  # scores again, dq and dk at D; dv and dscore at Dv
    assert counter.get_total_flops() == backward


def test_packed_sequences_count_their_own_pairs() -> None:
    query = torch.randn(10, 4, 8, requires_grad=True)
    key, value = torch.randn(12, 2, 8, requires_grad=True), torch.randn(12, 2, 6, requires_grad=True)
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32) for ends in ((0, 3, 3, 10), (0, 5, 7, 12)))
    pairs = 4 * (3 * 5 + 7 * 5)
    with FlopCounterMode(display=False) as counter:
        out = fastattn.attention_varlen(query, key, value, ends_q, ends_k)
    assert counter.get_total_flops() == 2 * pairs * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 6)


def test_packed_sequences_without_values_count_as_equally_long() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        query, ends = torch.randn(10, 4, 8), torch.zeros(3, dtype=torch.int32)
        fastattn.attention_varlen(query, query, query, ends, ends, 5, 5)
    assert counter.get_total_flops() == 2 * 4 * 2 * 5 * 5 * 16


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_counts_its_places(paged: bool) -> None:
    query, cache = torch.randn(2, 4, 3, 8), torch.zeros(2, 2, 16, 8)
    table = torch.zeros(2, 3, dtype=torch.int32) if paged else None
    with FlopCounterMode(display=False) as counter:
        lengths = torch.full((2,), 5, dtype=torch.int32)
        fastattn.attention_kv_cache(query, cache, cache.clone(), lengths, block_table=table)
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * (48 if paged else 16) * 16


@pytest.mark.parametrize(("reduction", "products"), [("mean", (3, 0)), ("none", (1, 3))])
def test_a_linear_loss_counts_the_products_it_makes(reduction: str, products: tuple[int, int]) -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    target = torch.randint(0, 10, (6,))
    one = 2 * 6 * 4 * 10
    with FlopCounterMode(display=False) as counter:
        loss = fastattn.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert counter.get_total_flops() == products[0] * one
    with FlopCounterMode(display=False) as counter:
        loss.sum().backward()
    assert counter.get_total_flops() == products[1] * one


@pytest.mark.parametrize(
    "imports",
    [
        "fastattn, torch.utils.flop_counter",
        "torch.utils.flop_counter, fastattn",
        "fastattn, importlib.util; importlib.util.find_spec('torch.utils.flop_counter')",
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str) -> None:
    script = (
        f"import torch, {imports}; from torch.utils.flop_counter import flop_registry as r;"
        "print(*sorted(str(op) for op in r if str(op).startswith('fastattn')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    ops = ("attention_bwd", "attention_fwd", "attention_weights", "attention_weights_bwd")
    losses = tuple(f"linear_cross_entropy_{kind}" for kind in ("bwd", "fwd", "sum"))
    packed = ("varlen_bwd", "varlen_fwd")
    assert done.stdout.split() == [f"fastattn.{op}" for op in (*ops, "kv_cache_fwd", *losses, *packed)]
