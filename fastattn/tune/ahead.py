"""Compiles the Triton attention kernels ahead of time, without a GPU, for the cycle model."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastattn.kernels import launches
from fastattn.kernels.tiles import FAMILIES, Tile
from fastattn.spec import AttentionSpec, GradsNeeded
from fastattn.tune.cycles.report import Kernel, Prediction, predict_cubin
from fastattn.tune.device import Inputs, Shape
from fastattn.tune.plan import Work

MODELLED = ("forward", "dkdv", "dq")  # the kernels whose loops can be modelled
MODEL_ARCH = 90  # the modelled architecture
SMALL = Shape(1, 2, 2, 16, 16)  # kernels are not specialised by length, so the smallest suffices


def target_of(arch: str | int) -> Any:
    """Triton's name for an NVIDIA architecture, 10 times a compute capability, or for an AMD one."""
    from triton.backends.compiler import GPUTarget

    text = str(arch)
    return GPUTarget("hip", text, 64) if text.startswith("gfx") else GPUTarget("cuda", int(text), 32)


def specialise(launch: Any, target: Any) -> tuple[Any, Any]:
    """The source and options that Triton's own launcher would compile for these arguments on `target`."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.args, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), parsed


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "needs Triton to compile the kernels, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces Triton's compiler; unset it"
    return None


def launch_of(work: Work, tile: Tile) -> Any:
    """The launch of one of MODELLED with a tile, on small tensors, for compilation only."""
    inputs = Inputs.of(work, SMALL, torch.device("cpu"))
    call = inputs.call()
    packing = None if inputs.cu_seqlens is None else launches.Packing(inputs.cu_seqlens, inputs.cu_seqlens)
    query, key, value = call.query, call.key, call.value
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    blocks = None
    if call.query_segments is not None:
        blocks = torch.empty(query.shape[0], 4, 4, dtype=torch.int32, device="cpu")
    if work.kernel == "forward":
        spec = AttentionSpec.of(call)
        return launches.forward_launch(spec, call, out, lse, blocks, tile, packing)
    spec = AttentionSpec.of(call, GradsNeeded())
    flowing = launches.UpstreamGrads(lse, None if call.bias is None else lse, lse, out)
    if work.kernel == "dkdv":
        return launches.dkdv_launch(spec, call, flowing, key, value, blocks, tile, packing)
    return launches.dq_launch(spec, call, flowing, query, None, None, blocks, tile, packing)


def predict_launch(launch: Any, name: str, kernel: str, head_dim: int) -> Prediction:
    """Compile a launch for sm_90 and replay its loop.

    Raises:
        ValueError: the loop has no matrix products, or the block needs too much shared memory.
    """
    import triton

    target = target_of(MODEL_ARCH)
    source, options = specialise(launch, target)
    binary = triton.compile(source, target=target, options=options.__dict__)
    shared, limit = binary.metadata.shared, FAMILIES[MODEL_ARCH][1]
    if shared > limit:
        raise ValueError(f"needs {shared} bytes of shared memory, the limit is {limit}")
    stationary = launch.arguments["BLOCK_N" if kernel == "dkdv" else "BLOCK_M"]
    described = Kernel(name, kernel, head_dim, int(getattr(stationary, "value", stationary)), shared)
    return predict_cubin(binary.asm["cubin"], described)


def predict_work(work: Work, tile: Tile) -> Prediction:
    """A kernel on a kind of call with a tile, by the model."""
    return predict_launch(launch_of(work, tile), f"{work}, {tile}", work.kernel, padded(work))


def padded(work: Work) -> int:
    """The head dim of the matrix products: the next power of two, at least 16."""
    widest = max(work.head_dim, work.value_dim)
    return max(16, 1 << (widest - 1).bit_length())
