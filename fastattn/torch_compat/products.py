"""Matrix products of a CPU by oneDNN and FBGEMM, with weights kept in their order."""

from __future__ import annotations

import functools
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lookup import find

_bfloat16_products = find("torch.ops.mkldnn._is_mkldnn_bf16_supported")
_float16_products = find("torch.ops.mkldnn._is_mkldnn_fp16_supported")


@functools.cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype by oneDNN.

    Fallback: False, and callers widen their operands.
    """
    supported = {torch.bfloat16: _bfloat16_products, torch.float16: _float16_products}.get(dtype)
    return supported is not None and bool(supported())


_matrix_instructions: Any = find("torch.cpu._is_amx_tile_supported")


@functools.cache
def has_matrix_instructions() -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 by the processor's instructions for matrices (AMX).

    Fallback: False, and callers widen their operands.
    """
    return (
        _matrix_instructions is not None
        and has_fast_products(torch.bfloat16)
        and bool(_matrix_instructions())
    )


_onednn_linear: Any = find("torch.ops.mkldnn._linear_pointwise")
_HAS_ONEDNN = _onednn_linear is not None and torch.backends.mkldnn.is_available()


def has_onednn_linear() -> bool:
    """Whether torch has oneDNN's linear layer, and this CPU oneDNN.

    Fallback: False, and linear layers are torch.nn.functional.linear.
    """
    return _HAS_ONEDNN


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN."""
    result: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return result


_avx512: Any = find("torch.cpu._is_avx512_supported")


@functools.cache
def has_mkl_on_intel() -> bool:
    """Whether torch has MKL, and the processor is of MKL's maker.

    Fallback: False where the maker is not known.
    """
    if not torch.backends.mkl.is_available():
        return False
    info = Path("/proc/cpuinfo")
    told = info.read_text(errors="replace") if info.exists() else platform.processor()
    return "GenuineIntel" in told


@functools.cache
def prefers_mkl() -> bool:
    """Whether torch has MKL, and MKL uses all vector instructions of this processor: one of its maker, or one without
    AVX-512.

    Fallback: False where neither is known, and large products are oneDNN's.
    """
    without_avx512 = _avx512 is not None and not _avx512()
    return has_mkl_on_intel() or (without_avx512 and torch.backends.mkl.is_available())


def large_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias for many rows, of a number that may not come again.

    oneDNN makes a kernel for each new number of rows, and copies operands that are transposed, as in a backward. MKL
    does neither, but does not use all vector instructions of every maker's processors.

    Fallback: torch.nn.functional.linear where torch has no oneDNN.
    """
    if not _HAS_ONEDNN or prefers_mkl():
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


ONEDNN_MIN_PRODUCTS = 1 << 24  # multiplications below which a oneDNN call costs more than it saves


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of matrices, without a gradient: large float32 ones on a CPU by `large_linear`, others as torch
    does.

    Fallback: torch's product.
    """
    if (
        _HAS_ONEDNN
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= ONEDNN_MIN_PRODUCTS
    ):
        return large_linear(x, weight, None)
    return x @ weight.mT


_reorder_linear: Any = find("torch.ops.mkldnn._reorder_linear_weight")


PACKED_ROWS = (
    8  # rows that weights are packed for: fast for one row too, while packing for one row is slow for several
)


@functools.cache
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype can be kept in the order in which oneDNN reads them: tried once, on first use.

    Fallback: False, and products read the weight as it is.
    """
    if not _HAS_ONEDNN or _reorder_linear is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        weight = torch.ones(32, 32, dtype=dtype, device="cpu")
        out = packed_linear(weight, pack_linear(weight), None)
    except RuntimeError:
        return False
    return bool((out == 32).all())


def pack_linear(weight: Tensor) -> Any:
    """A weight (O, I) in oneDNN's order for a product of a few rows.

    Fallback: none is needed, `has_packed_linear` says so.
    """
    return _reorder_linear(weight.detach(), PACKED_ROWS)


def packed_linear(x: Tensor, pack: Any, bias: Tensor | None, then: tuple[str, str] = ("none", "")) -> Tensor:
    """then(x @ weight.T + bias) with what `pack_linear` made of the weight; `then` names a function and its kind, one
    of oneDNN's that keep NaN: gelu, "none" (by erf) or "tanh", or swish, "".

    Fallback: none is needed, `has_packed_linear` says so.
    """
    function, kind = then
    result: Tensor = _onednn_linear(x, pack, bias, function, [], kind)
    return result


_int8_linear: Any = find("torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32")
_int8_pack: Any = find("torch.ops.quantized.linear_prepack")
_per_channel: Any = find("torch._make_per_channel_quantized_tensor")
_vnni: Any = find("torch.cpu._is_vnni_supported")


@functools.cache
def has_int8_linear() -> bool:
    """Whether torch was built with FBGEMM and its product of 8-bit numbers that returns float32.

    Fallback: False, and 8-bit numbers are multiplied in float64.
    """
    if _int8_linear is None or _int8_pack is None or _per_channel is None:
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    try:
        weight = torch.full((32, 32), -127, dtype=torch.int8, device="cpu")
        out = int8_linear(
            torch.full((1, 32), 3.0, device="cpu"),
            pack_int8_linear(weight, torch.full((32,), 0.5, device="cpu")),
        )
    except RuntimeError:
        return False
    return bool((out == -127 * 0.5 * 3 * 32).all())


@functools.cache
def has_int8_dot_products() -> bool:
    """Whether 8-bit products are summed in 32 bits, by AVX-512 VNNI, so that none saturates.

    Others sum two of them in 16 bits. Fallback: False, and activations use 7 bits.
    """
    return None not in (_avx512, _vnni) and bool(_avx512() and _vnni())


@functools.cache
def instructions() -> str:
    """The instruction set that this CPU has for products, as torch names it: "AVX2", "AVX512", "AVX512+VNNI"; with
    ", Intel" where `has_mkl_on_intel`.

    Fallback: the name alone.
    """
    name = str(torch.backends.cpu.get_cpu_capability())
    name = f"{name}+VNNI" if has_int8_dot_products() else name
    return f"{name}, Intel" if has_mkl_on_intel() else name


def pack_int8_linear(weight: Tensor, scale: Tensor) -> Any:
    """An int8 weight (O, I) and the float32 scale of each output, in FBGEMM's order.

    Fallback: none is needed, `has_int8_linear` says so.
    """
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64, device="cpu")
    # FBGEMM packs for the engine that is set; "x86", the usual one, may pack for oneDNN
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao's deprecation of quantised tensors
            return _int8_pack(_per_channel(weight, scale.double(), zeros, 0), None)
    finally:
        torch.backends.quantized.engine = engine


def int8_linear(x: Tensor, pack: Any) -> Tensor:
    """round(x) @ (weight * scale).T, float32, for float32 x of magnitude 127 at most, 63 without
    `has_int8_dot_products`.

    Fallback: none is needed, `has_int8_linear` says so.
    """
    # x becomes 0 .. 255 by adding this, or 0 .. 127 where two products with weights have to fit 16 bits
    zero = 128 if has_int8_dot_products() else 64
    result: Tensor = _int8_linear(x, 1.0, zero, pack)
    return result
