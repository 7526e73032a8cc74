"""Run under torchrun by test_distributed_attention.py: attention of DTensors and of a split sequence."""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import fastattn
from fastattn.integrations import context_parallel, dtensor

FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}  # sums in another order


def gathered_equal(found, expected):
    for mine, whole in zip(found, expected):
        torch.testing.assert_close(mine.full_tensor(), whole, **FLOAT64)


def dtensors(mesh):
    """Forward, backward and every gradient of calls split over batch and over heads, without a gather."""
    batch, heads, kv_heads, length, dim = 4, 8, 4, 33, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def run(query, key, value, bias, sinks, slopes, segments, lengths):
        leaves = [t.detach().clone().requires_grad_() for t in (query, key, value, bias, sinks, slopes)]
        query, key, value, bias, sinks, slopes = leaves
        out, lse = fastattn.attention(
            query, key, value, causal=True, bias=bias, sinks=sinks, alibi_slopes=slopes, segment_ids=segments,
            key_lengths=lengths, return_lse=True,
        )  # fmt: skip
        (out.square().sum() + lse.square().sum()).backward()
        return [out, lse, *(leaf.grad for leaf in leaves)]

    operands = [normal(batch, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    segments = torch.randint(0, 3, (batch, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    moved = 0
    for bias_shape, slopes_shape in itertools.product(
        [(1, heads, length, length), (batch, 1, 1, length)], [(heads,), (batch, heads)]
    ):
        inputs = [
            *operands,
            normal(*bias_shape),
            normal(heads),
            normal(*slopes_shape).abs(),
            segments,
            lengths,
        ]
        expected = run(*inputs)
        for over_heads in (False, True):
            own = 1 if over_heads else 0
            split = [Shard(own)] * 3
            split.append(Shard(own) if bias_shape[own] > 1 else Replicate())
            split.append(Shard(0) if over_heads else Replicate())
            of_slopes = Shard(len(slopes_shape) - 1) if over_heads else Shard(0)
            split.append(of_slopes if over_heads or len(slopes_shape) == 2 else Replicate())
            split += [Replicate() if over_heads else Shard(0)] * 2
            placed = [distribute_tensor(t, mesh, [p]) for t, p in zip(inputs, split)]
            with CommDebugMode() as communication:
                found = run(*placed)
            moved += sum(communication.get_comm_counts().values())
            gathered_equal(found, expected)
            assert found[0].placements == (Shard(own),)
    dropped = fastattn.attention(*operands, dropout_p=0.5, dropout_seed=3)
    placed = [distribute_tensor(t, mesh, [Shard(0)]) for t in operands]
    gathered_equal([fastattn.attention(*placed, dropout_p=0.5, dropout_seed=3)], [dropped])
    return moved


def modules(mesh):
    """MultiHeadAttention on inputs split over the batch, and with projections split over their rows."""

    def run(module, x):
        x = x.detach().clone().requires_grad_()
        out, _ = module(x, x, x, need_weights=False)
        out.square().sum().backward()
        return [out, x.grad, *(p.grad for p in module.parameters())]

    def shard(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if key.startswith("in_proj") else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))

    for partition, placement in ((None, Shard(0)), (shard, Replicate())):
        torch.manual_seed(1)
        module = fastattn.MultiHeadAttention(32, 4, batch_first=True, dtype=torch.float64)
        x = torch.randn(4, 9, 32, dtype=torch.float64)
        expected = run(module, x)
        module.zero_grad()
        gathered_equal(
            run(distribute_module(module, mesh, partition), distribute_tensor(x, mesh, [placement])), expected
        )


def sequences(rank, world_size):
    """Results and gradients of a split sequence are the rows of the whole one's; lengths need not divide."""
    cases = itertools.product(
        (37, 3, 1, 64),
        (True, "top_left", False),
        (None, (5, 0), (7, 3), (None, 2)),
        (False, True),
        (False, True),
    )
    for length, causal, window, documents, extras in cases:
        generator = torch.Generator().manual_seed(length)

        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: B023

        options = {"causal": causal, "window": window}
        if extras:
            options |= {"sinks": normal(4), "softcap": 5.0}
            options |= {"alibi_slopes": normal(4).abs()} if causal else {}
        whole = [normal(2, h, length, 8).requires_grad_() for h in (4, 2, 2)]
        ids = torch.randint(-1, 3, (2, length), generator=generator).sort()[0] if documents else None
        dout, dlse = normal(2, 4, length, 8), normal(2, 4, length)
        parts = context_parallel.split(length, world_size)

        def rows(tensor, dim=2):
            return context_parallel.take(tensor, parts[rank], dim)  # noqa: B023

        out, lse = fastattn.attention(*whole, segment_ids=ids, return_lse=True, **options)
        torch.autograd.backward((out, lse), (dout, dlse))
        own = [rows(t.detach()).clone().requires_grad_() for t in whole]
        mine = context_parallel.attention(
            *own, parts, segment_ids=None if ids is None else rows(ids, 1), return_lse=True, **options
        )
        torch.autograd.backward(mine, (rows(dout), rows(dlse)))
        for found, expected in zip((*mine, *(t.grad for t in own)), (out, lse, *(t.grad for t in whole))):
            torch.testing.assert_close(found, rows(expected), **FLOAT64)


def main(folder):
    dist.init_process_group("gloo")
    dtensor.register()
    dtensor.register()  # again: changes nothing
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    moved = dtensors(mesh)
    modules(mesh)
    sequences(rank, world_size)
    if rank == 0:
        (folder / "report.json").write_text(json.dumps({"collectives": moved, "processes": world_size}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
