"""What is compiled ahead of time: every kernel of every row of the tile tables, with the features that each serves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from typing import Any

import compile_record
import torch
from compile_inspect import AMD

ARCHITECTURES = ("80", "86", "89", "90", "100", "120", AMD)
AMD_SHARED = 65536
ATTENTION = ("forward", "dkdv", "dkdv_split", "sum_splits", "dq", "dbias", "weights")
FEATURES = {  # of an attention row: what it is compiled with, by whether something changes its scores
    False: ("plain", "causal", "causal, window, lengths, sinks", "causal, packed"),
    True: ("softcap, alibi", "bias, mask, segments", "dropout", "all", "softcap, alibi, dropout, packed"),
}
EVERY_FEATURE = ("80", "90")  # architectures whose rows are compiled with all of those; the others with
WITHOUT = ", without TMA"  # of a row that loads by TMA: the tile for operands that TMA cannot load
FEWER = {False: ("causal",), True: ("all",)}
CACHE_ARCHITECTURES = ("80", "86", "90", "100", "120")  # one of each family of tiles
ROW_ARCHITECTURES = ("80", "90")  # their tiles are the same everywhere
PACKED = ("forward", "dkdv", "dkdv_split", "dq")  # the kernels that packed sequences run on
GROUPED = {  # with eight query heads to a key head, where the loop over them matters: on EVERY_FEATURE
    "dkdv": ("causal, grouped", "causal, packed, grouped"),
    "dkdv_split": ("causal, grouped", "causal, packed, grouped"),
    "sum_splits": ("causal, grouped",),
}
ROW_KERNELS = ("softmax_fwd", "softmax_bwd", "cross_entropy_fwd", "cross_entropy_bwd")
CACHE_KERNELS = ("decode", "cache_append", "combine")
SPLITTING = ("dkdv_split", "sum_splits")
KERNELS = (*ATTENTION, *CACHE_KERNELS, *ROW_KERNELS)
DTYPES = {16: torch.bfloat16, 32: torch.float32}


@dataclass(frozen=True)
class Entry:
    """One kernel of one row, compiled with some features."""

    arch: str
    bits: int
    size: int  # head dim, or columns
    kernel: str
    features: str
    tile: str = field(compare=False, default="")

    @property
    def name(self) -> str:
        """What the row is called in the table on file; a row keeps its name, and its spills, when its tile changes."""
        arch = self.arch if self.arch == AMD else f"sm_{self.arch}"
        return f"{arch} {self.bits}-bit {self.size_name[0]}{self.size} {self.kernel} [{self.features}]"

    @property
    def size_name(self) -> str:
        """What `size` counts."""
        return "N, columns" if self.kernel in ROW_KERNELS else "D"

    @property
    def strict(self) -> bool:
        """Held to no spills: rows of softmax, and 16-bit attention without score features up to head dim 128. With
        grouped heads dk and dv spill what the loop over heads keeps, beside the loop over blocks: on record only."""
        if self.arch == AMD or ("grouped" in self.features and self.kernel != "sum_splits"):
            return False
        if self.kernel in ROW_KERNELS or self.kernel == "sum_splits":
            return True
        plain = self.features.removesuffix(WITHOUT) in FEATURES[False] or (
            self.kernel in CACHE_KERNELS and "all" not in self.features
        )
        return plain and self.size <= 128 and self.bits == 16

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory a block may use."""
        from fastattn.kernels.tiles import FAMILIES

        return AMD_SHARED if self.arch == AMD else FAMILIES[family(self.arch)][1]


def call_with(features: str, head_dim: int, bits: int, length: int = 16) -> Any:
    """A small call with the named features."""
    from fastattn.spec import AttentionCall

    batch = 1 if "packed" in features else 2
    query = torch.empty(batch, 8 if "grouped" in features else 2, length, head_dim, dtype=DTYPES[bits])
    key = query[:, :1] if "grouped" in features else query
    ids = torch.zeros(2, length, dtype=torch.int32)
    groups: dict[str, dict[str, Any]] = {
        "causal": {"causal": "bottom_right"},
        "softcap": {"softcap": 1.0},
        "alibi": {"alibi_slopes": torch.ones(1, 2)},
        "bias": {"bias": torch.empty(1, 2, length, length, dtype=DTYPES[bits])},
        "mask": {"mask": torch.empty(1, 1, length, length, dtype=torch.bool)},
        "segments": {"query_segments": ids, "key_segments": ids},
        "dropout": {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)},
        "lengths": {"key_lengths": torch.zeros(2, dtype=torch.int32)},
        "window": {"window_left": 3},
        "sinks": {"sinks": torch.ones(2)},
    }
    names = list(groups) if features == "all" else features.split(", ")
    options: dict[str, Any] = {}
    for name in names:
        options |= groups.get(name, {})
    return AttentionCall(query, key, key, **options)


def entries(architectures: Iterable[str] = ARCHITECTURES) -> Iterator[Entry]:
    """Every kernel of every row of some architectures, with each of the feature sets the row serves."""
    for arch in architectures:
        yield from _attention_entries(arch)
        if arch in CACHE_ARCHITECTURES:
            yield from _cache_entries(arch)
        if arch in ROW_ARCHITECTURES:
            yield from _row_entries(arch)


def _attention_entries(arch: str) -> Iterator[Entry]:
    from fastattn.kernels.tiles import TABLE, WITHOUT_TMA

    for key in TABLE:
        if key.family != family(arch):
            continue
        chosen = FEATURES if arch in EVERY_FEATURE else FEWER
        for kernel, features in product(ATTENTION, (*chosen[key.has_score_mods], *_grouped(arch, key))):
            if ("grouped" in features or kernel in SPLITTING) and features not in GROUPED.get(kernel, ()):
                continue
            row = tiles_on(arch, key, features)
            if kernel == "dbias" and "bias" not in features and features != "all":
                continue
            if "packed" in features and kernel not in PACKED:
                continue
            if kernel == "weights" and features not in ("plain", "all"):
                continue
            if kernel == "sum_splits":
                yield Entry(arch, key.bits, key.head_dim, kernel, features)
                continue
            field_name = {"weights": "dbias", "dkdv_split": "dkdv"}.get(kernel, kernel)
            tile = getattr(row, field_name)
            yield Entry(arch, key.bits, key.head_dim, kernel, features, short(tile))
            if tile.tma:
                other = getattr(WITHOUT_TMA[key], field_name)
                yield Entry(arch, key.bits, key.head_dim, kernel, features + WITHOUT, short(other))


def _grouped(arch: str, key: Any) -> tuple[str, ...]:
    return GROUPED["dkdv"] if arch in EVERY_FEATURE and not key.has_score_mods else ()


def _cache_entries(arch: str) -> Iterator[Entry]:
    import decode_compile

    for bits, head_dim, kernel, features in decode_compile.entries():
        launch = _cache_launches(arch, bits, head_dim, features)[kernel]
        tile = ""
        if kernel == "decode":
            shape = f"{launch.arguments['BLOCK_M']}x{launch.arguments['BLOCK_N']}"
            tile = f"{shape} {launch.num_warps}w {launch.num_stages}s"
        yield Entry(arch, bits, head_dim, kernel, features, tile)


def _cache_launches(arch: str, bits: int, head_dim: int, features: str) -> dict[str, Any]:
    import decode_compile

    return decode_compile.launches(int(arch), bits, head_dim, features)


def _row_entries(arch: str) -> Iterator[Entry]:
    import row_compile

    for bits, columns, features in row_compile.entries():
        for name in row_compile.launches(bits, columns, features):
            tile = row_compile.tile_of(name, bits, columns, features)
            yield Entry(arch, bits, columns, name, features, short(tile))


def short(tile: Any) -> str:
    """A tile in a few characters."""
    if hasattr(tile, "block_m"):
        shape = f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"
        shape += " TMA" if getattr(tile, "tma", False) else ""
        shape += " tf32x3" if getattr(tile, "tf32x3", False) else ""
        registers = getattr(tile, "max_registers", None)
        return shape + (f" {registers}r" if registers else "")
    return f"{tile.rows}x{tile.columns} {tile.num_warps}w" + ("" if tile.whole else " in chunks")


def family(arch: str) -> int:
    """Whose rows an architecture is compiled with."""
    from fastattn.kernels.tiles import family_of

    return 86 if arch == AMD else family_of(int(arch))


def tiles_on(arch: str, key: Any, features: str) -> Any:
    """A row of the table; without the stages of a pipeline for AMD, whose 64 KiB have no room for them."""
    from fastattn.kernels.tiles import READ_BY_SCORE, row_of

    row = row_of(key, features == "all" or any(name in features for name in READ_BY_SCORE))
    if arch != AMD:
        return row
    tiles = {each.name: replace(getattr(row, each.name), num_stages=1) for each in fields(row)}
    return replace(row, **tiles)


@cache
def _attention_launches(row: Any, bits: int, head_dim: int, features: str) -> dict[str, Any]:
    from attention_launches import launches_of

    from fastattn.kernels.launches import Packing

    cu_seqlens = torch.zeros(3, dtype=torch.int32)
    packing = Packing(cu_seqlens, cu_seqlens) if "packed" in features else None
    return launches_of(call_with(features, head_dim, bits), row, packing)


def launch_of(entry: Entry) -> Any:
    """The launch that is compiled for an entry, with the tile that the tables give it."""
    if entry.kernel in ROW_KERNELS:
        import row_compile

        return row_compile.launches(entry.bits, entry.size, entry.features)[entry.kernel]
    if entry.kernel in CACHE_KERNELS:
        return _cache_launches(entry.arch, entry.bits, entry.size, entry.features)[entry.kernel]
    from fastattn.kernels.tiles import WITHOUT_TMA, Key

    features = entry.features.removesuffix(WITHOUT)
    key = Key(family(entry.arch), entry.bits, entry.size, features in FEATURES[True])
    row = tiles_on(entry.arch, key, features) if features == entry.features else WITHOUT_TMA[key]
    launches = _attention_launches(row, entry.bits, entry.size, features)
    return launches[entry.kernel]


def key_of(entry: Entry) -> str:
    """What the compiler would be given for an entry now."""
    return compile_record.row_key(launch_of(entry), entry.arch)
