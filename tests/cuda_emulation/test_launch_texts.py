"""Checks of the sources for what the emulation cannot run: launch attributes and the memory of tensor maps."""

from __future__ import annotations

import re

from cuda_emulation.build import CSRC

TEXTS = {
    path.relative_to(CSRC).as_posix(): path.read_text()
    for path in sorted([*CSRC.rglob("*.cuh"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cu")])
}
LAUNCH = re.compile(r"([\w:<> ]+?)\s*<<<(.*?)>>>\(", re.DOTALL)
MAP = re.compile(r"(?:\w+ )?(?:\w+ )?\b(?:CUtensorMap|\w+Maps) \w+(?=\s*[,;=){])")  # with the words before it
STRUCT = re.compile(r"struct \w+Maps \{.*?\n\};", re.DOTALL)


def arguments(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "(<") - (character in ")>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [" ".join(part.split()) for part in parts]


def test_every_launch_has_the_shared_memory_attribute_it_needs() -> None:
    """Each kernel is prepared with the size of its launch; prepare_kernel sets the attribute above 48 KB."""
    launches = 0
    for name, text in TEXTS.items():
        for launch in LAUNCH.finditer(text):
            launches += 1
            kernel, shared = launch[1].split()[-1], arguments(launch[2])[2]
            wanted = rf"prepare_kernel\(reinterpret_cast<const void\*>\({kernel}\), {re.escape(shared)}\)"
            assert re.search(wanted, text[: launch.start()]), f"{name}: {launch[0]}"
    assert launches >= 3
    shared = TEXTS["kernels/kernel_launch.cuh"]  # the others go through launch_kernel
    assert "prepare_kernel(reinterpret_cast<const void*>(kernel), shape.shared_bytes)" in shared
    assert "config.dynamicSmemBytes = shape.shared_bytes;" in shared


def test_kernels_copy_no_tensor_map() -> None:
    """TMA reads maps that are grid-constant parameters; a copy on a thread's stack it would not find."""
    kernels = 0
    for name, text in TEXTS.items():
        if name.endswith("_launch.cuh") or not name.endswith(".cuh"):
            continue  # the host's
        for found in MAP.finditer(STRUCT.sub("", text)):
            assert "FASTATTN_GRID_CONSTANT" in found[0], f"{name}: {found[0]}"
            kernels += 1
    assert kernels >= 5
