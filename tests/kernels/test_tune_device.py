"""Tuning's own check of a tile, run as kernels run here: each kernel and feature is right, a wrong one is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILE

from fastattn.kernels import launches
from fastattn.kernels.tiles import Tile
from fastattn.tune.device import Device, Shape, over_rule
from fastattn.tune.plan import FEATURES, UNPACKED, Work

SMALL = Shape(batch=1, heads=2, kv_heads=1, seqlen_q=37, seqlen_k=45)
KINDS = [
    (),
    ("causal", "packed", "softcap"),
    ("causal", "alibi", "sinks"),
    ("bias", "mask", "lengths"),
    ("segments", "dropout", "window"),
]


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(torch.device(DEVICE), 90, SMALL)


def test_the_kinds_here_have_every_feature() -> None:
    assert {feature for kind in KINDS for feature in kind} == set(FEATURES)
    assert set(UNPACKED) < set(FEATURES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "+".join(kind) or "plain")
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_a_right_tile_has_no_reason_against_it(device: Device, kernel: str, kind: tuple[str, ...]) -> None:
    assert device.verdict(Work(kernel, "float16", 16, 16, kind), SMALL_TILE) is None


def test_the_bias_and_other_dtypes_and_dims(device: Device) -> None:
    assert device.verdict(Work("dbias", "float16", 16, 16, ("bias",)), SMALL_TILE) is None
    assert device.verdict(Work("forward", "float32", 16, 24), SMALL_TILE) is None


def test_a_tile_that_fails_is_refused_with_the_reason(device: Device) -> None:
    reason = device.verdict(Work("forward", "float16", 16, 16), Tile(16, 24, 4, 1))
    assert reason is not None
    assert "Error" in reason
    assert not reason.startswith("wrong")


@pytest.mark.parametrize(
    ("kernel", "launcher"), [("forward", "forward_launch"), ("dkdv", "dkdv_launch"), ("dq", "dq_launch")]
)
def test_a_tile_that_gives_a_wrong_answer_is_refused(
    device: Device, monkeypatch: pytest.MonkeyPatch, kernel: str, launcher: str
) -> None:
    """A kernel that scales by half a per cent too much for one tile only."""
    original, bad = getattr(launches, launcher), Tile(16, 32, 4, 1)

    def sabotaged(*args: Any, **kwargs: Any) -> Any:
        launch = original(*args, **kwargs)
        if bad not in args:
            return launch
        arguments = launch.arguments | {"scale": 1.005 * launch.arguments["scale"]}
        return launch._replace(args=tuple(arguments.values()))

    monkeypatch.setattr(launches, launcher, sabotaged)
    work = Work(kernel, "float16", 16, 16, ("causal",))
    assert device.verdict(work, SMALL_TILE) is None
    assert (device.verdict(work, bad) or "").startswith("wrong: ")


def test_a_sample_is_a_time(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.tune.device.timed", lambda work, memory: SMALL)
    assert 0 < device.seconds(Work("dq", "float16", 16, 16), SMALL_TILE) < 60


def test_the_rule() -> None:
    golden = torch.tensor([1.0, -torch.inf, 2.0], dtype=torch.float64)
    plain = golden.float() + torch.tensor([0.0, 0.0, 1e-3])
    assert over_rule(golden.float() + 1.9e-3, plain, golden, "lse") is None
    assert "off by" in (over_rule(golden.float() + 2.1e-3, plain, golden, "lse") or "")
    assert "infinite" in (over_rule(torch.zeros(3), plain, golden, "lse") or "")
    nan = golden.float().clone()
    nan[0] = torch.nan
    assert over_rule(nan, plain, golden, "lse") is not None
    assert over_rule(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64), "out") is None
