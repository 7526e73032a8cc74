"""A launch, and the groups of arguments that the attention kernels have in common.

A launch lists its arguments in the order of the kernel's parameters. Tensors that may be absent form one tuple.
Integers are parameters of their own: Triton compiles a variant for an integer that is 1 or a multiple of 16, and
`do_not_specialize`, which prevents it for a parameter, has no effect on what a tuple holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels.jit import Kernel, launcher
from fastattn.recorders import this_thread
from fastattn.strides import ALIGNMENT


class Launch(NamedTuple):
    """One kernel launch, complete: what runs on a GPU is what the compile checks compile."""

    kernel: Kernel
    grid: tuple[int, ...]
    args: tuple[object, ...]  # in the order of the kernel's parameters
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments by the names of the kernel's parameters."""
        return dict(zip(self.kernel.arg_names, self.args, strict=True))

    @property
    def options(self) -> dict[str, int | bool]:
        """Compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self) -> None:
        """Launch, unless there is nothing to do, or leave that to the recorder of this thread."""
        if 0 in self.grid:
            return
        if this_thread.recorder is None:
            self.start()
        else:
            this_thread.recorder.launch(self)

    def start(self) -> object:
        """Launch on the device of the first tensor; the compiled kernel, or None where Triton interprets."""
        with self._device():
            return self.kernel[self.grid](*self.args, **self.options)

    def starter(self, compiled: object) -> Callable[..., object]:
        """A function that makes this launch with other arguments of the same classes. It launches `compiled`, the
        kernel that `start` returned, directly, or through Triton's launcher where Triton's interface is unknown."""
        with self._device():
            direct = launcher(compiled, self.grid)
        empty = self._replace(args=())  # keeps no tensor
        return direct or (lambda *args: empty._replace(args=args).start())

    def _device(self) -> torch.cuda.device_of:
        for value in self.args:
            if isinstance(value, Tensor):
                return torch.cuda.device_of(value)
        raise TypeError("a launch needs a tensor, whose device it runs on")


class OptionalTensors(NamedTuple):
    """The tensors that an attention call may have beside its operands, one argument; None where absent."""

    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32, of a packed call
    cu_seqlens_k: Tensor | None = None
    key_lengths: Tensor | None = None  # (B,) int32
    mask: Tensor | None = None  # (B, H, Sq, Sk) uint8, any size 1
    bias: Tensor | None = None  # (B, H, Sq, Sk), any size 1
    query_ids: Tensor | None = None  # (B, Sq) int32: segments
    key_ids: Tensor | None = None  # (B, Sk) int32
    segment_blocks: Tensor | None = None  # (B, tiles, 4) int32, from segment_blocks_kernel
    slopes: Tensor | None = None  # (1 or B, H)
    sinks: Tensor | None = None  # (H,)
    seed: Tensor | None = None  # of dropout: one int64


class UpstreamTensors(NamedTuple):
    """What the passes of the backward read for each row or weight beside dout, one argument; None where absent."""

    reference: Tensor  # (B, H, Sq) float32, from attention_delta_kernel: lse for the passes' exponents
    lse_correction: Tensor | None  # (B, H, Sq) float32, given with a bias
    delta: Tensor | None  # (B, H, Sq) float32, from attention_delta_kernel
    dweights: Tensor | None  # (B, H, Sq, Sk), any strides


Strides = tuple[int, int, int]  # of batch, head and row, in units
ScoreStrides = tuple[int, int, int, int]  # of batch, head, query and key


def strides_of(tensor: Tensor, unit: int) -> Strides:
    """The three outer strides in units; that of a dimension of size 1 is never used and may be odd."""
    batch, head, row, _ = tensor.stride()
    num_batches, num_heads, num_rows, _ = tensor.shape
    return (
        in_units(batch, unit) if num_batches > 1 else 0,
        in_units(head, unit) if num_heads > 1 else 0,
        in_units(row, unit) if num_rows > 1 else 0,
    )


def in_units(stride: int, unit: int) -> int:
    """A stride in the spec's units. Another stride, of a tensor that the spec does not describe, is an error: the
    kernel would read other memory."""
    if stride % unit:
        raise ValueError(f"stride: got {stride}, needs a multiple of {unit}, as its spec says")
    return stride // unit


def score_strides_of(tensor: Tensor | None) -> ScoreStrides:
    """The strides of a tensor that broadcasts to (B, H, Sq, Sk): 0 where it does, or where there is none."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, query, key = tensor.stride()
    num_batches, num_heads, num_queries, num_keys = tensor.shape
    return (
        batch if num_batches > 1 else 0,
        head if num_heads > 1 else 0,
        query if num_queries > 1 else 0,
        key if num_keys > 1 else 0,
    )


def slope_stride_of(slopes: Tensor | None) -> int:
    """The stride of ALiBi slopes (1 or B, H) from sequence to sequence."""
    return slopes.stride(0) if slopes is not None and slopes.shape[0] > 1 else 0


def descriptor_of(tensor: Tensor, block: int) -> object:
    """A (B, H, S, D) tensor as TMA sees it, in blocks of `block` rows of one head; the stride of a dimension of size 1
    is never used, but has to be a multiple of 16 bytes."""
    unit = ALIGNMENT // tensor.element_size()
    strides = [stride if size > 1 else unit for size, stride in zip(tensor.shape[:3], tensor.stride())]
    width = max(16, next_power_of_2(tensor.shape[3]))
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block, width])


def has_unit_columns(tensor: Tensor | None) -> bool:
    """Whether neighbouring keys of a (B, H, Sq, Sk) tensor are neighbours in memory."""
    return tensor is not None and tensor.shape[3] > 1 and tensor.stride(3) == 1
