"""Reads the registers and threads of a cubin's kernels from its ELF sections."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod

MAX_THREADS, REQUIRED_THREADS, REGISTERS = 0x05, 0x10, 0x2F  # attributes of .nv.info
SIZED = 0x04  # the format of an attribute whose value follows its size
SYMBOL_TABLE = 2  # a type of section
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")


@dataclass(frozen=True)
class Resources:
    """The resources of a kernel's launch."""

    registers: int = 0  # a thread
    threads: int = 0  # of a block, the most it may have


def resources_of(cubin: bytes) -> dict[str, Resources]:
    """The resources of each kernel. Raises ValueError unless it is a 64-bit ELF file."""
    try:
        return _resources(cubin)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise ValueError("not a cubin: its ELF sections cannot be read") from None


def _resources(cubin: bytes) -> dict[str, Resources]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: needs a 64-bit ELF file")
    begin = struct.unpack_from("<Q", cubin, 40)[0]
    _, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    sections = [SECTION.unpack_from(cubin, begin + SECTION.size * i) for i in range(count)]
    names = _content(cubin, sections[names_at])
    symbols: list[str] = []
    registers: dict[str, int] = {}
    threads: dict[str, int] = {}
    for section in sections:
        if section[1] == SYMBOL_TABLE:
            text, table = _content(cubin, sections[section[6]]), _content(cubin, section)
            symbols = [_text(text, symbol[0]) for symbol in SYMBOL.iter_unpack(table)]
    for section in sections:
        name = _text(names, section[0])
        if name == ".nv.info":
            for attribute, value in _attributes(_content(cubin, section)):
                if attribute == REGISTERS:
                    index, number = struct.unpack("<II", value)
                    registers[symbols[index]] = number
        elif name.startswith(".nv.info."):
            for attribute, value in _attributes(_content(cubin, section)):
                if attribute in (MAX_THREADS, REQUIRED_THREADS):
                    threads[name.removeprefix(".nv.info.")] = prod(struct.unpack("<III", value))
    return {name: Resources(number, threads.get(name, 0)) for name, number in registers.items()}


def _content(cubin: bytes, section: tuple[int, ...]) -> bytes:
    return cubin[section[4] : section[4] + section[5]]


def _text(table: bytes, begin: int) -> str:
    return table[begin : table.index(0, begin)].decode()


def _attributes(info: bytes) -> list[tuple[int, bytes]]:
    """(attribute, value) of those that have a value with a size."""
    found, at = [], 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == SIZED:
            found.append((attribute, info[at : at + size]))
            at += size
    return found
