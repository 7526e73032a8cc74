"""What a Hopper GPU gets from Triton's own launcher: grids, arguments, tensor maps, memory, one variant for all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in_driver import HOPPER, Launched

pytestmark = pytest.mark.newer_triton
REPORT = Path(__file__).parent / "stand_in_report.py"
KERNELS = {
    "causal D64": {
        "attention_fwd_kernel",
        "attention_delta_kernel",
        "attention_dkdv_kernel",
        "attention_dq_kernel",
    },
    "few key heads D128": {"attention_dkdv_kernel", "sum_splits_kernel"},
    "rows of 1000": {
        "softmax_fwd_kernel",
        "softmax_bwd_kernel",
        "cross_entropy_fwd_kernel",
        "cross_entropy_bwd_kernel",
    },
    "cache D128": {"cache_append_kernel", "attention_decode_kernel", "attention_combine_kernel"},
    "one query D64": {"attention_decode_kernel"},
    "held": {"hold_kernel"},
}
# Kernels with more than one variant whatever the lengths: decoding writes results or, in splits, float32 parts of them;
# ranges of segments are found for blocks of the forward, of dk and dv, and of dq.
VARIANTS = {"attention_decode_kernel": 2, "segment_blocks_kernel": 3}


def reported(names: list[str], cached: Path) -> dict[str, Any]:
    """What a process that does not interpret says of calls, with a cache of its own."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cached)
    done = subprocess.run(
        [sys.executable, str(REPORT), *names],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout), "cubins": len(list(cached.rglob("*.cubin")))}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reported(NAMES, tmp_path_factory.mktemp("kernels"))


NAMES = ["causal D64", "full D128 by TMA", "packed D64", "rows of 1000", "cache D128", "replayed", "held"]
MORE = ["few key heads D128", "one query D64"]


@pytest.mark.exhaustive
def test_a_hopper_gpu_takes_every_launch_of_further_calls(tmp_path: Path) -> None:
    report = reported(MORE, tmp_path)
    for name in MORE:
        assert_taken(report, name)
        assert_compiled_once(report, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hopper_gpu_takes_every_launch(report: dict[str, Any], name: str) -> None:
    assert_taken(report, name)


def assert_taken(report: dict[str, Any], name: str) -> None:
    """That a call launches its kernels, and the driver takes them."""
    launches = report[name]["launches"]
    assert launches
    assert [launch for launch in launches if launch["problems"]] == []
    assert KERNELS.get(name, set()) <= {launch["name"] for launch in launches}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_anew_for_other_lengths(report: dict[str, Any], name: str) -> None:
    """S = 2, 17, 1000 and 1024, batches and heads: each kernel is loaded once and launched for all of them."""
    assert_compiled_once(report, name)


def assert_compiled_once(report: dict[str, Any], name: str) -> None:
    """That no kernel of a call is loaded anew for another length."""
    loaded, launched = (
        Counter(report[name]["loaded"]),
        Counter(each["name"] for each in report[name]["launches"]),
    )
    assert set(loaded) == set(launched)
    assert recompiled(loaded) == {}
    if name != "held":
        assert min(launched.values()) >= 2
        assert max(launched.values()) >= 3


def recompiled(loaded: Counter[str]) -> dict[str, int]:
    """The kernels of which there are more variants than there should be."""
    return {kernel: number for kernel, number in loaded.items() if number > VARIANTS.get(kernel, 1)}


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_hopper_gpu_takes_every_row_of_the_tables(dim: int, tmp_path: Path) -> None:
    """With each set of features that a row serves, by TMA where it says so, and no variant too many over lengths."""
    sys.path.append(str(REPORT.parent))
    from compile_entries import FEATURES
    from decode_compile import FEATURES as CACHE_FEATURES

    sets = [features for features in (*FEATURES[False], *FEATURES[True]) if "packed" not in features]
    names = ["softcap D80 float16"] if dim == 64 else []
    sets += ["softcap, alibi, dropout, packed", *(f"cache, {features}" for features in CACHE_FEATURES[16])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(REPORT), *names, *(f"{features} D{dim}" for features in sets)],
        capture_output=True, text=True, env=environment, check=False, timeout=1400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == len(sets) + len(names)
    refused = {
        name: [each["problems"] for each in found[name]["launches"] if each["problems"]] for name in found
    }
    assert {name: problems for name, problems in refused.items() if problems} == {}
    again = {name: recompiled(Counter(found[name]["loaded"])) for name in found}
    assert {name: kernels for name, kernels in again.items() if kernels} == {}
    by_tma = {name for name, each in found.items() if any(launch["maps"] for launch in each["launches"])}
    assert by_tma >= {f"{features} D{dim}" for features in ("plain", "causal", "dropout", "softcap, alibi")}


@pytest.mark.slow
def test_tma_passes_maps_and_the_others_none(report: dict[str, Any]) -> None:
    by_tma = {each["name"]: each["maps"] for each in report["full D128 by TMA"]["launches"]}
    assert by_tma["attention_fwd_kernel"] >= 3
    assert by_tma["attention_dkdv_kernel"] >= 4
    assert by_tma["attention_dq_kernel"] >= 4
    assert by_tma["attention_delta_kernel"] == 0
    assert sum(each["maps"] for each in report["rows of 1000"]["launches"]) == 0


@pytest.mark.slow
def test_replays_launch_the_compiled_kernel_with_the_same_arguments(report: dict[str, Any]) -> None:
    """The first call of each is recorded, through Triton's launcher; the two others go past it."""
    launches = report["replayed"]["launches"]
    kept = ("name", "grid", "arguments", "numbers", "maps", "problems")
    made = [tuple(map(launch.get, kept)) for launch in launches]
    first, rest = [], []
    for launch, what in zip(launches, made):
        (rest if launch["direct"] else first).append(what)
    assert [name for name, *_ in first] == [
        "softmax_fwd_kernel", "attention_fwd_kernel", "attention_delta_kernel", "attention_dkdv_kernel",
        "attention_dq_kernel",
    ]  # fmt: skip
    assert len(rest) == 2 * len(first)
    for what in first:
        assert rest.count(what) == 2
    assert not any(launch["direct"] for launch in report["causal D64"]["launches"])


@pytest.mark.slow
def test_what_is_compiled_can_be_carried(report: dict[str, Any]) -> None:
    """The cache holds a binary of every kernel, under the keys that a GPU's process looks for."""
    assert report["cubins"] >= len({name for call in NAMES for name in report[call]["loaded"]})
    assert report["held"]["launches"][0]["volatile"]


@pytest.mark.slow
def test_kernels_carried_in_an_archive_are_not_compiled_again(tmp_path: Path) -> None:
    """Triton lists files by where they lay: in another folder they are found only once the lists are put right."""
    pytest.importorskip("triton")
    sys.path.append(str(REPORT.parents[2] / "benchmarks"))
    from evidence import carried

    def fill(folder: Path) -> dict[str, float]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        subprocess.run(
            [sys.executable, str(REPORT), "--fill", str(folder), "held", "rows of 1000"],
            check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return {path.name: path.stat().st_mtime for path in folder.rglob("*.cubin")}

    first = fill(tmp_path / "made")
    assert "hold_kernel.cubin" in first
    carried.pack(_empty(tmp_path / "out"), tmp_path / "away", str(tmp_path / "made"))
    shutil.rmtree(tmp_path / "made")
    moved = carried.triton_cache(tmp_path / "away" / carried.KERNELS, tmp_path / "there")
    assert {path.suffix for path in moved.rglob("*") if path.is_file()} <= {".json", ".cubin", ".so"}
    os.utime(next(moved.rglob("hold_kernel.cubin")), (1, 1))
    again = fill(moved)
    assert set(again) == set(first)
    assert again["hold_kernel.cubin"] == 1  # as it was carried


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


PTX = ".entry k(\n .param .u64 .ptr k_0,\n .param .u32 k_1,\n .param .align 64 .b8 k_2[128],\n .param .u64 .ptr k_3\n)"


def launch(**changes: Any) -> Launched:
    base = torch.zeros(4, 64, dtype=torch.bfloat16)
    described = SimpleNamespace(base=base, shape=[4, 64], strides=[64, 1], block_shape=[4, 64])
    for name in ("shape", "strides", "block_shape", "base"):
        if name in changes:
            setattr(described, name, changes.pop(name))
    metadata = SimpleNamespace(shared=changes.pop("shared", 1000), num_warps=4, tensordesc_meta=[], name="k")
    fields = {
        "name": "k", "grid": (1, 1, 1), "arguments": {"x": base, "n": 3, "d": described},
        "types": {"x": "*bf16", "n": "i32", "d": "tensordesc<bf16[4, 64]>"}, "metadata": metadata, "ptx": PTX,
    }  # fmt: skip
    return Launched(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"grid": (0, 1, 1)}, "grid"),
        ({"grid": (1, 70_000, 1)}, "grid"),
        ({"shared": HOPPER["max_shared_mem"] + 1}, "shared memory"),
        ({"strides": [60, 1]}, "d: strides"),
        ({"strides": [64, 2]}, "d: last stride"),
        ({"shape": [0, 64]}, "d: sizes"),
        ({"block_shape": [512, 64]}, "d: box"),
        ({"block_shape": [4, 128]}, "d: row of the box"),
        ({"base": torch.zeros(300, dtype=torch.bfloat16)[1:]}, "d: address"),
        ({"types": {"x": "*fp16", "n": "i32", "d": "tensordesc"}}, "*fp16 is passed torch.bfloat16"),
        ({"ptx": PTX.replace(".u32", ".u64")}, "the entry takes"),
        ({"ptx": PTX.replace(".b8 k_2[128]", ".u64 k_2")}, "the entry takes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_device_refuses_is_seen(changes: dict[str, Any], problem: str) -> None:
    assert launch().problems() == []
    assert any(problem in text for text in launch(**changes).problems())
