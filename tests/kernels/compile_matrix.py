"""Compiles every row of tiles.py ahead of time, without a GPU, and reports registers, shared memory, spills and wgmma.

    python tests/kernels/compile_matrix.py                    the rows of sm_80 and sm_90
    python tests/kernels/compile_matrix.py --all              every architecture; writes compile_table.json
    python tests/kernels/compile_matrix.py --arch 90 --json - one architecture, JSON to standard output

Exit status 1 if shared memory overflows anywhere or a row that must not spill does.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.kernels.launches import Launch

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes per block


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes per thread
    local_ops: int  # loads and stores of local memory in the SASS
    wgmma: int


def specialise(launch: Launch, target: Any) -> Any:
    """The source and options that Triton's own launcher would compile for these arguments on `target`."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
    bound, specialization, options = binder(**launch.args, **options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile one launch for a CUDA architecture and inspect the binary."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    source, options = specialise(launch, target)
    binary = triton.compile(source, target=target, options=options.__dict__)
    return inspect_binary(binary)


def inspect_binary(binary: Any) -> Report:
    """Registers, stack, spills and wgmma of a compiled kernel, from the tools in triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(tools / "cuobjdump", "-sass", file.name)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=binary.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_ops=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        wgmma=len(re.findall(r"wgmma\.mma_async", binary.asm["ptx"])),
    )


def _run(*command: Any) -> str:
    environment = {**os.environ, "PATH": f"{Path(command[0]).parent}:{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout
