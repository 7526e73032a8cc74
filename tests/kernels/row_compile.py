"""Compiles the kernels on rows ahead of time, without a GPU, for every tile of row_tiles.py; prints JSON.

python tests/kernels/row_compile.py [ARCH ...]        sm_80 and sm_90 unless named
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

COLUMNS = (1, 64, 1000, 4096, 16384, 32768, 262144)  # whole rows, some to a program, and long ones


def softmax_launches(columns: int, dtype: torch.dtype, features: str) -> dict[str, Any]:
    """Forward and backward of softmax on a few rows: "plain", "strided" columns or "all" (mask, causal, log)."""
    from fastattn.kernels.row_tiles import row_tile_for
    from fastattn.kernels.softmax_launches import Rows, backward_launch, forward_launch
    from fastattn.spec import SoftmaxSpec

    strided, rich = features == "strided", features == "all"
    x = torch.empty(2, 4, columns, 16 if strided else 1, dtype=dtype)
    x, dim, inner = (x, 2, None) if strided else (x[..., 0], 2, 1 if rich else None)
    mask = torch.empty(x.shape, dtype=torch.bool) if rich else None
    launches = {}
    for backward in (False, True):
        spec = SoftmaxSpec.of(x, dim, mask=rich, causal=rich, log=rich, backward=backward)
        tile = row_tile_for(spec)
        if backward:
            rows = Rows.of([x, x, x], dim)
            launches["softmax_bwd"] = backward_launch(spec, x, x, x, rows, 0.5, tile)
        else:
            rows = Rows.of([x, x] if mask is None else [mask, x, x], dim, inner)
            launches["softmax_fwd"] = forward_launch(spec, x, mask, x, rows, int(rich), 0.5, tile)
    return launches


def loss_launches(classes: int, dtype: torch.dtype, smoothing: float) -> dict[str, Any]:
    """Forward and backward of cross-entropy on a few rows."""
    from fastattn.kernels.cross_entropy_launches import backward_launch, forward_launch
    from fastattn.kernels.row_tiles import loss_tile_for
    from fastattn.spec import CrossEntropyCall, SoftmaxSpec

    logits = torch.empty(4, classes, dtype=dtype)
    call = CrossEntropyCall(logits, torch.zeros(4, dtype=torch.int64), -100, smoothing)
    losses, norms, tile = torch.empty(4), torch.empty(4, 2), loss_tile_for(SoftmaxSpec.of(logits))
    return {
        "cross_entropy_fwd": forward_launch(call, losses, norms, tile),
        "cross_entropy_bwd": backward_launch(call, losses, norms, logits, tile),
    }


Entry = tuple[str, str, int, str]  # architecture, dtype, columns, features


def entries(architectures: list[str]) -> Iterator[Entry]:
    """Every kind of tile with every kind of feature."""
    for arch in architectures:
        for dtype in ("bfloat16", "float32"):
            for columns in COLUMNS:
                yield arch, dtype, columns, "plain"
            for columns in (64, 16384, 262144):
                yield arch, dtype, columns, "all"
            for columns in (64, 4096):
                yield arch, dtype, columns, "strided"
            for features in ("loss", "smoothed loss"):
                yield arch, dtype, 50257, features
                yield arch, dtype, 131072, features


def few() -> Iterator[Entry]:
    """The longest rows held whole, by which dtype they are hardest to hold, and the rest once."""
    yield "80", "float32", 16384, "plain"
    yield "90", "float32", 32768, "plain"
    yield "90", "bfloat16", 262144, "all"
    yield "80", "bfloat16", 64, "strided"
    yield "90", "bfloat16", 50257, "smoothed loss"


def signatures() -> dict[str, list[str]]:
    """What Triton would look compiled kernels up by: per kernel, over lengths that should share one variant."""
    from compile_matrix import specialise, target_of

    found: dict[str, list[str]] = {}
    half = torch.float16
    groups = [softmax_launches(columns, half, "plain") for columns in (1032, 1600, 2048)]
    groups += [
        {f"{name} long": launch for name, launch in softmax_launches(columns, half, "plain").items()}
        for columns in (40000, 65536, 300000)
    ]
    groups += [loss_launches(classes, half, 0.1) for classes in (32000, 50264, 131072)]
    for group in groups:
        for name, launch in group.items():
            source, options = specialise(launch, target_of("90"))
            found.setdefault(name, []).append(
                str((source.signature, source.constants, source.attrs, options.num_warps))
            )
    return found


def compiled(entry: Entry) -> dict[str, dict[str, Any]]:
    """What the compiler made of the kernels of an entry."""
    from compile_matrix import compile_launch

    arch, dtype_name, columns, features = entry
    dtype = getattr(torch, dtype_name)
    if "loss" in features:
        launches = loss_launches(columns, dtype, 0.1 if features.startswith("smoothed") else 0.0)
    else:
        launches = softmax_launches(columns, dtype, features)
    return {
        f"sm_{arch} {dtype_name} {columns} {features} {name}": asdict(compile_launch(launch, arch))
        for name, launch in launches.items()
    }


def main() -> None:
    """The command line."""
    every = "--all" in sys.argv
    chosen = list(entries(sys.argv[2:] or ["80", "90"]) if every else few())
    reports: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(2) as pool:
        for made in pool.map(compiled, chosen):
            reports |= made
    print(json.dumps({"compiled": reports, "signatures": signatures()}, indent=1))


if __name__ == "__main__":
    main()
