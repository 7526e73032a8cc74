"""Prints as JSON what Triton looks compiled kernels up by, for calls of many lengths; run by test_specialisation.py."""

from __future__ import annotations

import json

import decode_compile
import row_compile
import torch
from attention_launches import launches_of
from compile_inspect import specialise
from triton.backends.compiler import GPUTarget

from fastattn.kernels.arguments import Launch
from fastattn.kernels.launches import Packing, sequence_sums_launch
from fastattn.kernels.tiles import Tile
from fastattn.spec import AttentionCall, VarlenCall

TILE = Tile(64, 64, 4, 2)


def call(batch: int, heads: int, length: int, padding: int) -> AttentionCall:
    """A call with every feature whose rows lie `padding` elements apart."""
    query = torch.empty(batch, length, heads, 64 + padding, dtype=torch.float16).transpose(1, 2)[..., :64]
    ids = torch.zeros(batch, length, dtype=torch.int32)
    return AttentionCall(
        query,
        query,
        query,
        bias=torch.empty(1, heads, length, length),
        mask=torch.empty(1, 1, length, length, dtype=torch.bool),
        query_segments=ids,
        key_segments=ids,
        key_lengths=torch.zeros(batch, dtype=torch.int32),
        alibi_slopes=torch.ones(batch, heads),
        dropout_seed=torch.zeros(1, dtype=torch.int64),
        dropout_p=0.1,
        softcap=2.0,
        causal="bottom_right",
        window_left=length,
        scale=0.125,
    )


def signature(launch: object) -> str:
    """The types, constants and attributes of a launch's arguments, its options included."""
    source, options = specialise(launch, GPUTarget("cuda", 90, 32))
    return str((source.signature, source.constants, source.attrs, options.num_warps, options.num_stages))


def report(calls: list[AttentionCall]) -> dict[str, list[str]]:
    """The signatures of every kernel over calls."""
    rows: dict[str, list[str]] = {}
    for one in calls:
        for name, launch in launches_of(one, TILE).items():
            rows.setdefault(name, []).append(signature(launch))
    return rows


def packed_launches(batch: int, tokens: int, heads: int) -> dict[str, Launch]:
    """The launches of a packed call."""
    query = torch.empty(tokens, heads, 64, dtype=torch.float16)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32)
    call = VarlenCall(
        query, query, query, cu_seqlens, cu_seqlens, causal="bottom_right", window_left=9, softcap=2.0, scale=0.125,
        alibi_slopes=torch.ones(2, heads), dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    packing = Packing(cu_seqlens, cu_seqlens)
    launches = launches_of(call.as_one_sequence(), TILE, packing)
    sums = torch.empty(batch, heads, dtype=torch.float64)
    launches["sums"] = sequence_sums_launch(torch.empty(heads, 9), packing, tokens, 64, sums)
    return launches


def packed_report(sizes: list[tuple[int, int, int]]) -> dict[str, list[str]]:
    """The signatures of every kernel over packed calls of (sequences, tokens, heads)."""
    rows: dict[str, list[str]] = {}
    for size in sizes:
        for name, launch in packed_launches(*size).items():
            rows.setdefault(name, []).append(signature(launch))
    return rows


def specialised_integers() -> dict[str, list[str]]:
    """By kernel, the integer parameters, constants aside, whose value or divisibility decides which variant runs.

    In a tuple, `do_not_specialize` has no effect.
    """
    launches = launches_of(call(2, 4, 17, 0), TILE) | packed_launches(3, 17, 4)
    launches |= decode_compile.launches(90, 16, 64, decode_compile.APPEND)
    for features in ("plain", "loss"):
        launches |= row_compile.launches(16, 262144, features)
    launches |= row_compile.launches(16, 64, "plain")
    found: dict[str, list[str]] = {}
    for launch in launches.values():
        names = found.setdefault(launch.kernel.__name__, [])
        for parameter, value in zip(launch.kernel.params, launch.args, strict=True):
            in_tuple = isinstance(value, tuple) and any(isinstance(part, int) for part in value)
            alone = isinstance(value, int) and not parameter.do_not_specialize
            names += [parameter.name] if (in_tuple or alone) and not parameter.is_constexpr else []
    return found


if __name__ == "__main__":
    lengths = [call(2, 4, length, 0) for length in (2, 17, 1000, 1024)]
    shapes = [call(1, 16, 33, 0), call(16, 2, 33, 0)]
    unaligned = [call(2, 4, length, padding) for length in (17, 32) for padding in (1, 4, 13)]
    packed = [(1, 2, 4), (3, 17, 4), (16, 1000, 4), (17, 1024, 1), (300, 5000, 16)]
    print(
        json.dumps(
            {
                "lengths": report(lengths + shapes),
                "unaligned": report(unaligned),
                "packed": packed_report(packed),
                "integers": specialised_integers(),
            }
        )
    )
