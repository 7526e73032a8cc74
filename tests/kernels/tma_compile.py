"""Compiles kernels whose operands come by TMA for Hopper and prints what came out as JSON; run by test_tma.py."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch
from attention_launches import launches_of
from compile_inspect import compile_launch

from fastattn.kernels.launches import Packing
from fastattn.kernels.tiles import Tiles, tiles_without_tma
from fastattn.spec import AttentionSpec, VarlenCall


def compiled(kernel: str, packed: bool) -> dict[str, object]:
    """The report of a kernel on a causal call, padded or packed."""
    query = torch.empty(512, 4, 128, dtype=torch.bfloat16)
    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    call = VarlenCall(
        query, query, query, cu_seqlens, cu_seqlens, causal="bottom_right", scale=0.1
    ).as_one_sequence()
    tile = getattr(tiles_without_tma(AttentionSpec.of(call).replace(device="cuda", arch=90)), kernel)
    tile = replace(tile, tma=True)
    packing = Packing(cu_seqlens, cu_seqlens) if packed else None
    return asdict(compile_launch(launches_of(call, Tiles(tile, tile, tile, tile), packing)[kernel], "90"))


if __name__ == "__main__":
    made = {name: compiled(name, packed=False) for name in ("forward", "dkdv", "dq")}
    print(json.dumps(made | {"packed forward": compiled("forward", packed=True)}))
