"""Compiles the forward with operands loaded by TMA for Hopper and prints what came out as JSON; run by test_tma.py."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch
from compile_inspect import compile_launch

from fastattn.kernels.launches import Packing, forward_launch
from fastattn.kernels.tiles import table_tiles
from fastattn.spec import AttentionSpec, VarlenCall


def compiled(head_dim: int, packed: bool) -> dict[str, object]:
    """The report of a causal call, padded or packed."""
    query = torch.empty(512, 4, head_dim, dtype=torch.bfloat16)
    edges = torch.zeros(3, dtype=torch.int32)
    call = VarlenCall(query, query, query, edges, edges, causal="bottom_right", scale=0.1).as_one_sequence()
    spec = AttentionSpec.of(call).replace(device="cuda", arch=90)
    tile = replace(table_tiles(spec).forward, tma=True)
    out, lse = torch.empty_like(call.query), torch.empty(1, 4, 512)
    packing = Packing(edges, edges) if packed else None
    return asdict(compile_launch(forward_launch(spec, call, out, lse, None, tile, packing), "90"))


if __name__ == "__main__":
    print(json.dumps({"padded": compiled(128, packed=False), "packed": compiled(64, packed=True)}))
