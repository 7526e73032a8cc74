"""What the kernels on rows are compiled with, for compile_entries.py; run by itself, compiles a few and prints JSON.

python tests/kernels/row_compile.py                what launches of many lengths are looked up by
python tests/kernels/row_compile.py --compile      the hardest rows
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from typing import Any

import torch

COLUMNS = (64, 4096, 16384, 32768, 262144)  # whole rows, some to a program, and long ones
VOCABULARY = 50257
DTYPES = {16: torch.bfloat16, 32: torch.float32}
LOSSES = {  # by features: label smoothing, and class weights with z-loss
    "loss": (0.0, False),
    "smoothed loss": (0.1, False),
    "weighted loss": (0.1, True),
}


def softmax_launches(columns: int, dtype: torch.dtype, features: str) -> dict[str, Any]:
    """Forward and backward of softmax on a few rows: "plain", "strided" columns or "all" (mask, causal, log)."""
    from fastattn.kernels.row_tiles import row_tile_for
    from fastattn.kernels.softmax_launches import Rows, backward_launch, forward_launch

    everything = features == "all"
    x, dim, inner = _rows(columns, dtype, features)
    mask = torch.empty(x.shape, dtype=torch.bool) if everything else None
    launches = {}
    for backward in (False, True):
        spec = _softmax_spec(columns, dtype, features, backward)
        tile = row_tile_for(spec)
        if backward:
            rows = Rows.of([x, x, x], dim)
            launches["softmax_bwd"] = backward_launch(spec, x, x, x, rows, 0.5, tile)
        else:
            rows = Rows.of([x, x] if mask is None else [mask, x, x], dim, inner)
            launches["softmax_fwd"] = forward_launch(spec, x, mask, x, rows, int(everything), 0.5, tile)
    return launches


def _rows(columns: int, dtype: torch.dtype, features: str) -> tuple[torch.Tensor, int, int | None]:
    """(x, the dimension of its columns, the innermost of its row dimensions if one has to be)."""
    if features == "strided":
        return torch.empty(2, 4, columns, 16, dtype=dtype), 2, None
    return torch.empty(2, 4, columns, dtype=dtype), 2, 1 if features == "all" else None


def _softmax_spec(columns: int, dtype: torch.dtype, features: str, backward: bool) -> Any:
    from fastattn.spec import SoftmaxSpec

    x, dim, _ = _rows(columns, dtype, features)
    everything = features == "all"
    return SoftmaxSpec.of(x, dim, mask=everything, causal=everything, log=everything, backward=backward)


def loss_launches(classes: int, dtype: torch.dtype, features: str) -> dict[str, Any]:
    """Forward and backward of cross-entropy on a few rows."""
    from fastattn.kernels.cross_entropy_launches import backward_launch, forward_launch
    from fastattn.kernels.row_tiles import loss_tile_for
    from fastattn.spec import CrossEntropyCall, SoftmaxSpec

    logits, (smoothing, weighted) = torch.empty(4, classes, dtype=dtype), LOSSES[features]
    extras = (torch.empty(classes), 1e-4) if weighted else ()
    call = CrossEntropyCall(logits, torch.zeros(4, dtype=torch.int64), -100, smoothing, *extras)
    spec, losses, norms = SoftmaxSpec.of(logits), torch.empty(4), torch.empty(4, 2)
    tile = loss_tile_for(spec)
    return {
        "cross_entropy_fwd": forward_launch(spec, call, losses, norms, tile),
        "cross_entropy_bwd": backward_launch(spec, call, losses, norms, logits, tile),
    }


@cache
def launches(bits: int, columns: int, features: str) -> dict[str, Any]:
    """The launches of a row of the compile table, by kernel."""
    if features in LOSSES:
        return loss_launches(columns, DTYPES[bits], features)
    return softmax_launches(columns, DTYPES[bits], features)


def tile_of(kernel: str, bits: int, columns: int, features: str) -> Any:
    """The tile such a launch is made with."""
    from fastattn.kernels.row_tiles import loss_tile_for, row_tile_for
    from fastattn.spec import SoftmaxSpec

    if features in LOSSES:
        return loss_tile_for(SoftmaxSpec.of(torch.empty(4, columns, dtype=DTYPES[bits])))
    return row_tile_for(_softmax_spec(columns, DTYPES[bits], features, kernel == "softmax_bwd"))


Row = tuple[int, int, str]  # bits, columns, features


def entries() -> Iterator[Row]:
    """Every kind of tile with every kind of feature."""
    for bits in DTYPES:
        for columns in COLUMNS:
            yield bits, columns, "plain"
        for columns in (16384, 262144):
            yield bits, columns, "all"
        for columns in (64, 4096):
            yield bits, columns, "strided"
        for features in LOSSES:
            yield bits, VOCABULARY, features


# The longest rows held whole, by which dtype they are hardest to hold, and the rest once.
FEW: tuple[tuple[str, Row], ...] = (
    ("80", (32, 16384, "plain")),
    ("90", (32, 32768, "plain")),
    ("90", (16, 262144, "all")),
    ("80", (16, 64, "strided")),
    ("90", (16, 50257, "weighted loss")),
)


def signatures() -> dict[str, list[str]]:
    """What Triton would look compiled kernels up by: per kernel, over lengths that should share one variant."""
    from compile_inspect import specialise, target_of

    found: dict[str, list[str]] = {}
    half = torch.float16
    groups = [softmax_launches(columns, half, "plain") for columns in (1032, 1600, 2048)]
    groups += [
        {f"{name} long": launch for name, launch in softmax_launches(columns, half, "plain").items()}
        for columns in (40000, 65536, 300000)
    ]
    groups += [loss_launches(classes, half, "smoothed loss") for classes in (32000, 50264, 131072)]
    for group in groups:
        for name, launch in group.items():
            source, options = specialise(launch, target_of("90"))
            found.setdefault(name, []).append(
                str((source.signature, source.constants, source.attrs, options.num_warps))
            )
    return found


def compiled(entry: tuple[str, Row]) -> dict[str, dict[str, Any]]:
    """What the compiler made of the kernels of an entry."""
    from compile_inspect import compile_launch

    arch, row = entry
    return {
        f"sm_{arch} {row} {name}": asdict(compile_launch(launch, arch))
        for name, launch in launches(*row).items()
    }


def main() -> None:
    """The command line."""
    reports: dict[str, dict[str, Any]] = {}
    if sys.argv[1:] == ["--compile"]:
        with ProcessPoolExecutor(2) as pool:
            for made in pool.map(compiled, FEW):
                reports |= made
        print(json.dumps({"compiled": reports}, indent=1))
    else:
        print(json.dumps({"signatures": signatures()}, indent=1))


if __name__ == "__main__":
    main()
