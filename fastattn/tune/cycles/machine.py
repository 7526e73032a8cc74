"""Assumptions of the cycle model about a Hopper multiprocessor: pipes, latencies, tensor cores, shared memory.

None of it was measured by this project. Throughputs are those of the CUDA programming guide for compute capability 9.0
and of the published peak (989 TFLOP/s of dense bfloat16 at 132 multiprocessors and 1830 MHz); latencies are the usual
order of magnitude. Not in the model: power, L2, HBM, prologues, and copies by TMA, which have always arrived.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

QUARTERS = 4  # of a multiprocessor, each with a scheduler of its own that issues one instruction a cycle
CLOCK_HZ = 1.83e9
MULTIPROCESSORS = 132
TENSOR_FLOP = 4096  # a cycle of a multiprocessor, 16-bit operands
SHARED_BYTES = 128  # a cycle of a multiprocessor
REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY = 233472  # bytes of a multiprocessor, 228 KiB
THREADS = 2048  # of a multiprocessor
BLOCK_RESERVED = 1024  # bytes of shared memory that are reserved for each block besides its own
DEFAULT_LATENCY = 6  # from issue to the use of a result, in cycles
TENSOR_LATENCY = 32  # from the end of a product to the end of the wait for it
TENSOR_START = 8  # from issue to the start of a product
BARRIER_LATENCY = 12  # from an arrival of one warpgroup to the issue of another
MEETING_LATENCY = 8  # from the last arrival to the issue of all
READ_LATENCY = 12  # from issue to the end of reading operands
FENCE_CYCLES = 25  # for which a memory barrier stalls its warp
DQ_WARP_CYCLES = 500  # for which the warp that stores dq is busy with one tile


class Kind(NamedTuple):
    """A class of instructions, with the resources of one quarter that it uses for one warp."""

    name: str
    opcodes: str  # a regular expression for their beginning
    pipe: str | None = None
    cycles: int = 0  # of the pipe
    latency: int = DEFAULT_LATENCY
    shared: int = 0  # cycles of shared memory that the same instruction takes in all four quarters


# In order: the first that matches counts.
KINDS = (
    Kind("wgmma", r"HGMMA"),
    Kind("exp2", r"MUFU\.EX2", "mufu", 8, 23),
    Kind("special", r"MUFU", "mufu", 8, 23),
    Kind("mma", r"HMMA", "mma", 6, 33),  # two thirds of the rate of wgmma
    Kind("fma", r"FFMA|FMUL|FADD", "fma", 1),
    Kind("max", r"FMNMX", "alu", 2),
    Kind("select", r"FSEL|FSET", "alu", 2),
    Kind("convert", r"F2FP|F2F|HADD2|PRMT", "alu", 2, 12),
    Kind("shuffle", r"SHFL", "lsu", 8, 24),
    Kind("load matrix", r"LDSM", "lsu", 16, 33, 16),
    Kind("load shared", r"LDS", "lsu", 8, 28, 4),
    Kind("store matrix", r"STSM", "lsu", 16, 12, 16),
    Kind("store shared", r"STS", "lsu", 16, 12, 16),
    Kind("barrier", r"BAR|WARPSYNC|BSYNC|BSSY|NANOSLEEP"),
    Kind("mbarrier", r"SYNCS|UCGABAR", "lsu", 8, 20),
    Kind("tma", r"UTMA|UBLK"),
    Kind("copy", r"LDGSTS", "lsu", 16, 12),
    Kind("global", r"LDG|STG|LD\.|ST\.|ATOM|RED", "lsu", 8, 40),
    Kind("local", r"LDL|STL", "lsu", 8, 30),
    Kind("constant", r"LDC|ULDC", "uniform", 4, 40),
    Kind("wgmma wait", r"WARPGROUP\.DEPBAR|LDGDEPBAR|DEPBAR"),
    Kind("wgmma fence", r"WARPGROUP"),
    Kind("fence", r"FENCE|MEMBAR|CCTL|ERRBAR"),
    Kind("branch", r"BRA|BRX|CALL|RET|JMP|EXIT|YIELD|BMOV|BREAK"),
    Kind("move", r"MOV|CS2R|S2R|S2UR|R2UR|UMOV|R2P|P2R|IMAD\.MOV", "alu", 1, 12),
    Kind("vote", r"VOTE|ELECT|PLOP3|UPLOP3", "alu", 2, 12),
    Kind("uniform", r"U[A-Z]", "uniform", 2, 12),
    Kind("integer fma", r"IMAD", "fma", 2, 12),
    Kind("integer", r"I|LOP|SHF|LEA|SEL|SGXT|BMSK|VIADD|VIMNMX|POPC|FLO", "alu", 2, 12),
    Kind("no operation", r"NOP"),
)
OTHER = Kind("other", r"")


@functools.cache
def kind_of(opcode: str) -> Kind:
    """The class of an opcode such as "FMUL.FTZ"."""
    return next((kind for kind in KINDS if re.match(kind.opcodes, opcode)), OTHER)


class Product(NamedTuple):
    """One wgmma of a warpgroup: rows x columns x depth, its left operand in shared memory or in registers."""

    rows: int
    columns: int
    depth: int
    left_in_shared: bool

    @property
    def flop(self) -> int:
        """Operations."""
        return 2 * self.rows * self.columns * self.depth

    @property
    def tensor_cycles(self) -> float:
        """Cycles of a multiprocessor's tensor cores."""
        return self.flop / TENSOR_FLOP

    @property
    def shared_cycles(self) -> float:
        """Cycles of shared memory for 16-bit operands, each read once."""
        right = self.columns * self.depth * 2 / SHARED_BYTES
        return right + (self.rows * self.depth * 2 / SHARED_BYTES if self.left_in_shared else 0)
