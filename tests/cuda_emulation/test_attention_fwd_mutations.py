"""The forward kernel with one line broken: the emulation has to notice, in every schedule it tries."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_emulation.attention_forward import Case, check
from cuda_emulation.build import HERE, ROOT, EmulationError, Library, build

KERNEL, LAUNCH = "kernels/attention_fwd_sm90.cuh", "kernels/attention_fwd_launch.cuh"
CHOICE = "const AttentionParams& params, Function function) {\n"
PACKED = Case("packed", seqlen_q=(300, 170), seqlen_k=(300, 400), heads=2, kv_heads=2, leftover=90, blocks=1)


@dataclass(frozen=True)
class Mutation:
    """One occurrence of some text, in the order of the file, replaced."""

    name: str
    old: str
    new: str = ""
    occurrence: int = 0

    def __str__(self) -> str:
        return self.name

    def apply(self, text: str) -> str:
        """The mutated text; the original has to be there."""
        parts = text.split(self.old)
        assert len(parts) > self.occurrence + 1, f"{self.name}: the kernel has changed"
        at = self.occurrence + 1
        return self.old.join(parts[:at]) + self.new + self.old.join(parts[at:])


MUTATIONS = [
    Mutation("keys read before they are there", "barriers.keys.wait_full(key_state);", occurrence=1),
    Mutation("values read before they are there", "barriers.values.wait_full(value_state);", occurrence=1),
    Mutation("scores touched in flight", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    Mutation("result touched in flight", "wgmma_wait<0>();", "wgmma_wait<1>();", occurrence=2),
    Mutation("values cleared without a fence", "fence_proxy_async();"),
    Mutation("values not cleared", "zero_rows<Shape::kBlockN, Shape::kHeadDim>(tile, keys_here);"),
    Mutation("result stored without a fence", "fence_proxy_async();", occurrence=1),
    Mutation("result stored before all wrote it", "warpgroup_sync();", occurrence=1),
    Mutation("result overwritten while it is stored", "bulk_wait_read<0>();"),
]


def _with_one_shape(text: str) -> str:
    """The choice of a shape reduced to its last: builds are shorter."""
    before, body = text.split(CHOICE)
    last = body.index("\n  return function(")
    return before + CHOICE + body[last:]


def _library(mutation: Mutation, tmp_path: Path) -> Library:
    """The kernel test of a copy of csrc with the mutation in it."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for name, change in ((KERNEL, mutation.apply), (LAUNCH, _with_one_shape)):
        path = csrc / name
        path.write_text(change(path.read_text()))
    source = csrc / "attention_fwd.cpp"  # beside kernels/: its includes find the copies
    source.write_text('#pragma GCC optimize("O1")\n' + (HERE / "attention_fwd.cpp").read_text())
    return build(source, tmp_path, ("HEAD_DIM=64", "ELEMENT=half_t"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    library = _library(mutation, tmp_path)
    for seed in range(3):
        with pytest.raises((EmulationError, AssertionError)):
            check(lambda *_: library, PACKED, seed=seed, landing=("eager", "lazy", "random")[seed % 3])
