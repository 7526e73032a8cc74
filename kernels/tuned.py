"""Tiles found for the machine at hand: the file that `fastattn bench tune` writes and `tiles_for` reads once.

A winner serves exactly what it was found for, dtype, dims and features, on the device, the versions and the kernel
sources it was found with. Everything else keeps the built-in tables. Most are measured; `--model --store` stores those
of the cycle model, which a measured one replaces and which never replace a measured one.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastattn.cache import cache_dir, write_atomically
from fastattn.kernels.tiles import Tile, Tiles, table_tiles, tiles_without_tma
from fastattn.spec import AttentionSpec
from fastattn.versions import version

FORMAT, VERSION = "fastattn-tiles", 1
KERNELS = ("forward", "dkdv", "dq", "dbias")  # the fields of Tiles
FEATURES = ("key_lengths", "mask", "bias", "segments", "alibi", "softcap", "sinks", "dropout")
BLOCKS, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), range(1, 9)
REGISTER_CAPS = (None, 128)
TMA_KERNELS = ("forward", "dkdv", "dq")
MEASURED, MODEL = "measured", "model"  # where a winner comes from


@cache
def tiles_for(spec: AttentionSpec, packed: bool = False) -> Tiles:
    """The tiles of attention on a spec: those measured on this machine where there are any, else the table's. Where TMA
    cannot load the operands, the table's others replace those that load by TMA."""
    tiles = replace(table_tiles(spec), **winners_for(spec, packed))
    if spec.fits_tma:
        return tiles
    others = tiles_without_tma(spec)
    by_tma = [name for name in TMA_KERNELS if getattr(tiles, name).tma]
    return replace(tiles, **{name: getattr(others, name) for name in by_tma})


@dataclass(frozen=True)
class Machine:
    """The installation and device that a measurement is valid for."""

    device: str  # its marketing name
    capability: str  # "9.0"
    fastattn: str
    triton: str
    kernels: str  # hash of the kernel sources

    @classmethod
    def of(cls, device: str, arch: int) -> Machine:
        """This installation on a device."""
        return cls(device, f"{arch // 10}.{arch % 10}", version("fastattn"), version("triton"), source_hash())

    @property
    def path(self) -> Path:
        """Where its winners are kept; other kernel sources overwrite them."""
        parts = (self.device, self.capability, self.fastattn, self.triton)
        name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)
        return cache_dir() / "tiles" / f"{name}.json"


@dataclass(frozen=True)
class Winner:
    """The fastest tile of one kernel on one kind of call, and what it and the built-in tile took.

    That is the time of a call where it was measured. By the model it is that of 64 x 128 scores on a multiprocessor.
    """

    tile: Tile
    ms: float
    built_in_ms: float
    source: str = MEASURED


def signature(spec: AttentionSpec, kernel: str, packed: bool = False) -> str:
    """The dtype, dims, window bounds and features that a kernel is compiled for, in a line."""
    names = [name for name in FEATURES if getattr(spec, name) and (name != "sinks" or kernel == "forward")]
    names += ["left"] if spec.window_left else []
    names += ["right"] if spec.window_right or spec.causal != "none" else []
    names += ["alibi_grad"] if spec.alibi_grad and kernel == "dq" else []
    names += ["packed"] if packed else []
    dtype = str(spec.dtype).removeprefix("torch.")
    if spec.dtype.itemsize == 4:
        dtype += f" {spec.float32_precision}"
    return f"{kernel} {dtype} D{spec.head_dim} Dv{spec.value_dim} {' '.join(names) or 'plain'}"


def winners_for(spec: AttentionSpec, packed: bool = False) -> dict[str, Tile]:
    """The tiles on file for a spec by kernel; empty where there are none, or for odd strides."""
    return {kernel: winner.tile for kernel, winner in entries_for(spec, packed).items()}


def entries_for(spec: AttentionSpec, packed: bool = False) -> dict[str, Winner]:
    """The same with the entries of the file."""
    if spec.arch is None or not spec.aligned or spec.int64_offsets:
        return {}
    known = winners_here(spec.arch)
    found = {kernel: known.get(signature(spec, kernel, packed)) for kernel in KERNELS}
    return {kernel: winner for kernel, winner in found.items() if winner is not None}


@cache
def winners_here(arch: int) -> dict[str, Winner]:
    """The winners on file for the devices of an architecture; a file that can't be used is one warning."""
    name = device_name(arch)
    if name is None:
        return {}
    machine = Machine.of(name, arch)
    if not machine.path.exists():
        return {}
    try:
        return load(machine)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{machine.path} is not used, the built-in tiles are: {error}; `fastattn bench tune` writes it anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def device_name(arch: int) -> str | None:
    """The name of this machine's devices of an architecture; None if there are none, or of several names."""
    import torch

    names = {
        torch.cuda.get_device_name(index)
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(index) == divmod(arch, 10)
    }
    return names.pop() if len(names) == 1 else None


def load(machine: Machine) -> dict[str, Winner]:
    """The winners on file for a machine, by signature; ValueError says what is wrong with the file."""
    stored = json.loads(machine.path.read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or (stored.get("format"), stored.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is not a {FORMAT} file of version {VERSION}")
    if stored.get("machine") != asdict(machine):
        raise ValueError("it was measured on another device, or with other versions or kernels")
    if not isinstance(stored.get("winners"), dict):
        raise ValueError("it has no winners")
    return {name: _winner(name, entry) for name, entry in stored["winners"].items()}


def store(machine: Machine, winners: Mapping[str, Winner]) -> None:
    """Replace the winners on file for a machine."""
    entries = {name: asdict(winner) for name, winner in sorted(winners.items())}
    stored = {"format": FORMAT, "version": VERSION, "machine": asdict(machine), "winners": entries}
    write_atomically(machine.path, json.dumps(stored, indent=1) + "\n")


def _winner(name: str, entry: Any) -> Winner:
    """An entry of the file, checked."""
    try:
        tile, ms, built_in_ms = Tile(**entry["tile"]), float(entry["ms"]), float(entry["built_in_ms"])
        source = entry["source"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name!r} is no winner ({type(error).__name__}: {error})") from None
    sizes_known = tile.block_m in BLOCKS and tile.block_n in BLOCKS
    if not (sizes_known and tile.num_warps in WARPS and tile.num_stages in STAGES):
        raise ValueError(f"{name!r} has an impossible tile, {tile}")
    if not isinstance(tile.tf32x3, bool) or (tile.tf32x3 and " float32 ieee " not in name):
        raise ValueError(f"{name!r} asks for tf32x3 where no exact float32 products are made")
    if not isinstance(tile.tma, bool) or (
        tile.tma and (name.split()[0] not in TMA_KERNELS or " float32 " in name)
    ):
        raise ValueError(
            f"{name!r} asks for TMA, which only 16-bit operands of {', '.join(TMA_KERNELS)} come by"
        )
    if tile.max_registers not in REGISTER_CAPS:
        raise ValueError(f"{name!r} asks for {tile.max_registers} registers, needs one of {REGISTER_CAPS}")
    if source not in (MEASURED, MODEL):
        raise ValueError(f"{name!r} has the source {source!r}, needs {MEASURED} or {MODEL}")
    return Winner(tile, ms, built_in_ms, source)


@cache
def source_hash() -> str:
    """A hash of the kernels' sources: a change of them makes measurements out of date."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
