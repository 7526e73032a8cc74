"""Compiles one kernel launch ahead of time, without a GPU, and reads what the compiler made of it from the binary."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.tune.ahead import specialise, target_of

AMD = "gfx942"
AMD_WARPS = 16  # a wavefront has 64 lanes, a block 1024


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel; error is set if it failed."""

    registers: int = 0
    shared: int = 0  # bytes
    stack: int = 0  # bytes per thread
    local_ops: int = 0  # loads and stores of local memory in the SASS
    async_mma: int = 0  # asynchronous matrix instructions in the PTX: wgmma, tcgen05
    wide_copies: int = 0  # asynchronous copies of 16 bytes to shared memory in the PTX
    tma_copies: int = 0  # copies of tiles by TMA in the PTX
    error: str = ""


def intermediate(launch: Any, arch: str) -> str:
    """A hash of what Triton's front end makes of a launch, with all that the rest of the compiler depends on.

    It takes a twentieth of the time of a compilation, and says whether a change of source is one of code.
    """
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    target = target_of(arch)
    backend = make_backend(target)
    launch = _runnable(launch, arch)
    source, options = specialise(launch, target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    made = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    text = stages["ttir"](made, {}).str_nodebug()
    return hashlib.sha256(f"{text} {launch.options} {arch}".encode()).hexdigest()[:16]


def _runnable(launch: Any, arch: str) -> Any:
    return launch._replace(num_warps=min(launch.num_warps, AMD_WARPS)) if arch == AMD else launch


def compile_launch(launch: Any, arch: str | int) -> Report:
    """Compile one launch for an architecture and inspect the binary."""
    import triton

    target = target_of(str(arch))
    source, options = specialise(_runnable(launch, str(arch)), target)
    binary = triton.compile(source, target=target, options=options.__dict__)
    return Report(shared=binary.metadata.shared) if str(arch) == AMD else inspect_binary(binary)


def inspect_binary(binary: Any) -> Report:
    """Registers, stack, spills and matrix instructions of a compiled kernel, from the tools in triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(tools / "cuobjdump", "-sass", file.name)
    ptx = binary.asm["ptx"]
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=binary.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_ops=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        async_mma=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", ptx)),
        tma_copies=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        wide_copies=len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
    )


def _run(*command: Any) -> str:
    environment = {**os.environ, "PATH": f"{Path(command[0]).parent}:{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout
