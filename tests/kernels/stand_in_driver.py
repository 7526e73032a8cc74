"""A stand-in for the driver of a GPU: Triton compiles and launches as usual, and launches are recorded instead of run.

Everything up to the driver's launch is Triton's own: binding, specialisation, its caches, the compiler, the checks of
resources. So a launch that a GPU would refuse, or a kernel compiled anew for another length, shows on any machine; and
the kernels lie in TRITON_CACHE_DIR afterwards as a GPU of this kind, with the same Triton and Python, looks for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HOPPER = {  # an H100's, as its driver gives them
    "max_shared_mem": 232_448,
    "multiprocessor_count": 132,
    "max_num_regs": 65_536,
    "warpSize": 32,
    "sm_clock_rate": 1_980_000,
    "mem_clock_rate": 2_619_000,
    "mem_bus_width": 5120,
}
_indices = count()
MAP_BYTES = 128  # of a CUtensorMap
MOST_GRID = (2**31 - 1, 65_535, 65_535)


@dataclass
class Launched:
    """One launch as the driver gets it."""

    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # those that are passed, by name, in order; of a tuple, what it holds
    types: dict[str, str]  # as the signature has them: "*bf16", "i32", "tensordesc<...>"
    metadata: Any
    ptx: str
    direct: bool = False  # without Triton's own launcher, which makes metadata for hooks

    def problems(self) -> list[str]:
        """Why a device would refuse it, or read what was not meant."""
        found = [f"grid {self.grid}" for size, most in zip(self.grid, MOST_GRID) if not 1 <= size <= most]
        if self.metadata.shared > HOPPER["max_shared_mem"]:
            found.append(f"{self.metadata.shared} bytes of shared memory")
        if not 1 <= self.metadata.num_warps <= 32:
            found.append(f"{self.metadata.num_warps} warps")
        for name, value in self.arguments.items():
            found += [f"{name}: {text}" for text in _wrong_type(value, self.types[name])]
        return found + self._wrong_parameters() + self._wrong_maps()

    def _wrong_parameters(self) -> list[str]:
        """The parameters of the compiled entry against what is passed, type by type.

        Beside its map, a descriptor passes its sizes and strides; last come pointers to scratch memory.
        """
        if not self.ptx:
            return []
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", self.ptx, re.DOTALL)
        assert entry is not None
        declared = ""
        for parameter in entry[2].split(","):
            kind = re.search(rf"\.(?:b8 \w+\[{MAP_BYTES}\]|[usbf]\d+)", parameter)
            assert kind is not None, parameter
            declared += (
                "map "
                if "[" in kind[0]
                else f"{kind[0][1]}{kind[0][2:]} ".replace("b", "u").replace("s", "u")
            )
        expected = "".join(_parameter(value, self.types[name]) for name, value in self.arguments.items())
        if re.fullmatch(f"{expected}(u64 ){{0,2}}", declared):
            return []
        return [f"the entry takes {declared.strip()}, passed is {expected}"]

    def _wrong_maps(self) -> list[str]:
        """What cuTensorMapEncodeTiled refuses."""
        found = []
        boxes = [entry for entry in getattr(self.metadata, "tensordesc_meta", None) or [] if entry]
        described = [(n, v) for n, v in self.arguments.items() if not isinstance(v, (Tensor, int, float))]
        for number, (name, value) in enumerate(described):
            size = value.base.element_size()
            box = list(boxes[number]["block_size"]) if number < len(boxes) else list(value.block_shape)
            strides = [stride * size for stride in value.strides[:-1]]
            wrong = {
                "rank": not 1 <= len(value.shape) <= 5,
                "address": value.base.data_ptr() % 16 != 0,
                "sizes": not all(1 <= extent <= 2**32 for extent in value.shape),
                "last stride": value.strides[-1] != 1,
                "strides": not all(stride % 16 == 0 and 0 < stride < 2**40 for stride in strides),
                "box": not all(1 <= extent <= 256 for extent in box),
                "row of the box": box[-1] * size % 16 != 0 or box[-1] * size > 128,
            }
            found += [f"{name}: {what}" for what, is_wrong in wrong.items() if is_wrong]
        return found


def _flat(names: Iterable[str], values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Values by name, and what tuples among them hold by the tuple's name and a place or field: "optional.mask"."""
    for name, value in zip(names, values):
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _flat((f"{name}.{field}" for field in fields), value)
        else:
            yield name, value


def _parameter(value: Any, declared: str) -> str:
    """A pattern of the parameters that one argument becomes."""
    if isinstance(value, Tensor):
        return "u64 "
    if not isinstance(value, (int, float)):
        return "map (?:u(?:32|64|8) )*"
    sizes = {
        "i1": "u8 ",
        "u1": "u8 ",
        "i32": "u32 ",
        "u32": "u32 ",
        "i64": "u64 ",
        "u64": "u64 ",
        "fp32": "f32 ",
    }
    return sizes[declared]


def _wrong_type(value: Any, declared: str) -> Iterator[str]:
    if declared.startswith("*") and not isinstance(value, Tensor):
        yield f"{declared} is passed a {type(value).__name__}"
    elif declared.startswith("*"):
        kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
                "i32": torch.int32, "i64": torch.int64, "i1": torch.bool, "u1": torch.bool, "i8": torch.int8,
                "u8": torch.uint8}[declared.lstrip("*k")]  # fmt: skip
        if value.dtype != kind:
            yield f"{declared} is passed {value.dtype}"
    elif declared == "i32" and not -(2**31) <= value < 2**31:
        yield f"i32 is passed {value}"


class Driver:
    """What Triton asks of an active driver."""

    def __init__(self, arch: int = 90) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.index = next(
            _indices
        )  # Triton keeps compiled kernels by device: another driver starts without any
        self.launched: list[Launched] = []
        self.loaded: list[str] = []  # the kernels, each once per variant
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: HOPPER,
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> Any:
        """The target of the stand-in device."""
        return self.target

    def get_current_device(self) -> int:
        """Its index."""
        return self.index

    def set_current_device(self, device: int) -> None:
        """Does nothing: there is one device."""

    def get_current_stream(self, device: int) -> int:
        """The null stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The CPU, which holds the tensors."""
        return torch.device("cpu")

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        self.loaded.append(name)
        return object(), 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What runs a compiled kernel: it keeps the launch."""
        names = source.fn.arg_names
        types = dict(_flat(names, source.signature.values()))

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            arguments = _flat(names, rest[len(rest) - len(names) :])
            passed = {name: value for name, value in arguments if types.get(name, "constexpr") != "constexpr"}
            self.launched.append(
                Launched(
                    metadata.name, (x, y, z), passed, types, metadata, self.ptx_of(metadata), rest[1] is None
                )
            )

        return launch

    def ptx_of(self, metadata: Any) -> str:
        """The compiled kernel's text, from Triton's cache."""
        from triton.runtime.cache import get_cache_manager

        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
        path = next((path for name, path in group.items() if name.endswith(".ptx")), None)
        if path is None:  # a cache that was carried here holds binaries alone
            return ""
        with open(path, encoding="utf-8") as file:
            return file.read()


@contextmanager
def active(arch: int = 90) -> Iterator[Driver]:
    """Inside, Triton launches on a device of this architecture, which keeps what it is handed."""
    from triton.runtime import driver

    stand_in = Driver(arch)
    properties = torch.cuda.get_device_properties
    driver.set_active(stand_in)  # type: ignore[arg-type]
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(  # type: ignore[assignment]
        multi_processor_count=HOPPER["multiprocessor_count"], major=arch // 10, minor=arch % 10,
        shared_memory_per_block_optin=HOPPER["max_shared_mem"], total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20, name="a device that is not there",
    )  # fmt: skip
    try:
        yield stand_in
    finally:
        torch.cuda.get_device_properties = properties
        driver.reset_active() if torch.cuda.is_available() else driver.set_active(None)  # type: ignore[arg-type]
