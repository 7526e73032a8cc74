"""The probes and the steps of the first run, executed on the torch backend and over the emulated extension."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import checkout
import fastattn
from evidence import first_run, first_run_steps, kernel_runs, probes
from evidence.first_run_steps import Scale
from fastattn import backends
from fastattn.backends.cuda import attention as cuda_attention

CPU = torch.device("cpu")
BENCHMARKS = checkout.BENCHMARKS
LAUNCHED = [name for name in first_run.STEPS if not name.startswith("8")]


class Broken:
    """The torch backend with parts that do something else."""

    def __init__(self, changed: dict[str, Any]) -> None:
        self._changed = changed

    def __getattr__(self, name: str) -> Any:
        return self._changed.get(name) or getattr(backends.torch_backend, name)


def run(name: str, ops: Any = backends.torch_backend) -> list[first_run_steps.StepResult]:
    return list(first_run.STEPS[name].run(ops, CPU, Scale.of(CPU)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_step_passes_where_the_kernels_are_right(name: str) -> None:
    results = run(name)
    assert results
    assert all(good for good, _ in results), results


@pytest.mark.parametrize("name", ["1", "2", "5", "7b"])
def test_other_backends_are_run_by_the_same_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, interpreted at small sizes: on a GPU its kernels go first."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernel_runs, "DTYPE", torch.float16)
    monkeypatch.setattr(first_run_steps, "HEAD_DIMS", (64,))
    monkeypatch.setattr(first_run_steps, "PANEL_DIMS", (128,))
    results = list(first_run.STEPS[name].run(backends.triton_backend, CPU, Scale(140, 140, 2, 2, 20)))
    assert results
    assert all(good for good, _ in results), results


def _altered(part: str, change: Any) -> Any:
    right = getattr(backends.torch_backend, part)

    def wrong(*args: Any) -> Any:
        return change(args, right(*args))

    return Broken({part: wrong})


def _grads(change: Any) -> Any:
    return lambda args, made: made._replace(query=change(made.query))


def _leaking(args: Any, made: Any) -> Any:
    """A packed forward whose last row of a sequence reads the next one's value, times zero."""
    call, (out, lse) = args[1], made
    ends = call.cu_seqlens_q[1:-1].long()
    out[ends - 1] = out[ends - 1] + 0.0 * call.value[ends].repeat_interleave(
        out.shape[1] // call.value.shape[1], 1
    )
    return out, lse


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("1", _altered("attention_fwd", lambda args, made: (made[0] * 1.1, made[1]))),
        ("2", _altered("attention_fwd", lambda args, made: (made[0].roll(64, -1), made[1]))),
        ("3", _altered("attention_bwd", _grads(lambda grad: grad * 1.1))),
        ("4", _altered("attention_fwd", lambda args, made: (made[0].roll(1, 2) * 1.0, made[1]))),
        ("5", _altered("varlen_fwd", _leaking)),
        ("5b", _altered("varlen_bwd", _grads(lambda grad: grad + 0.1))),
        ("6", _altered("attention_fwd", lambda args, made: (made[0] * 1.1, made[1]))),
        ("7b", _altered("attention_bwd", _grads(torch.zeros_like))),
        ("9", _altered("attention_bwd", _grads(lambda grad: grad + 1e-2 * torch.randn_like(grad)))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_sees_what_it_is_for(name: str, ops: Any) -> None:
    assert not all(good for good, _ in run(name, ops))


def _refusing(head_dims: tuple[int, ...]) -> Any:
    """The torch backend with one_pass refused at these head dims, as the extension refuses it."""

    def refuse(right: Any) -> Any:
        def run(spec: Any, *args: Any) -> Any:
            if cuda_attention.ONE_PASS_HEAD_DIMS and spec.head_dim in head_dims:
                raise ValueError("one_pass: needs a head dim of at most 128, no softcap and all gradients")
            return right(spec, *args)

        return run

    return Broken(
        {name: refuse(getattr(backends.torch_backend, name)) for name in ("attention_bwd", "varlen_bwd")}
    )


@pytest.mark.parametrize("name", ["3", "5b", "6b"])
def test_a_missing_one_pass_fails_where_the_kernels_have_one(name: str) -> None:
    """Head dim 256 has none: refusing it is right, refusing 64 or 128 is not."""
    assert all(good for good, _ in run(name, _refusing((256,))))
    for head_dim in (64, 128):
        wrong = [text for good, text in run(name, _refusing((head_dim, 256))) if not good]
        assert len(wrong) == 1
        assert wrong[0].startswith(f"D{head_dim}")
        assert "the one-pass backward is missing" in wrong[0]


@pytest.mark.parametrize("name", ["9", "9b"])
def test_many_launches_of_a_missing_one_pass_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_runs, "backend_for", lambda device, backend: _refusing((128, 256)))
    statuses = [item["status"] for item in first_run.run_step(name, CPU, Scale.of(CPU))]
    assert statuses == ["failed"]


def test_a_probe_of_a_missing_one_pass_fails() -> None:
    probe = probes.DIRECTIONS["backward one pass"].probe
    with pytest.raises(ValueError, match="one_pass"):
        probe(_refusing((64, 256)), CPU)
    said = probe(_refusing((256,)), CPU)
    assert "D128" in said
    assert "D256" not in said


def test_the_bytes_of_views_are_followed_from_every_memory_order() -> None:
    for order in ("bhsd", "bshd", "sbhd", "slice"):
        operands, expected = first_run_steps._selecting(CPU, 3, 20, 8, order)
        assert operands.query.shape == (2, 3, 20, 8)
        assert torch.equal(fastattn.attention(*operands.inputs, backend="torch"), expected)
    below = first_run_steps._selecting(CPU, 3, 20, 8, "bshd")[0].query
    assert below.stride(1) < below.stride(2)


def test_steps_are_in_the_order_of_risk_and_each_has_a_limit() -> None:
    numbers = [int(name.rstrip("b")) for name in first_run.STEPS]
    assert sorted(set(numbers)) == list(range(1, 10))
    assert numbers == sorted(numbers)
    assert all(0 < step.limit <= 300 for step in first_run.STEPS.values())
    assert not [n for n, step in first_run.STEPS.items() if step.backward and n in first_run.SANITIZED]


def test_on_a_gpu_each_backend_s_steps_are_collected_in_order_and_the_extension_s_backward_last() -> None:
    path = Path(__file__).resolve().parents[1] / "gpu" / "test_first_run.py"
    module = runpy.run_path(str(path))
    (mark,) = [mark for mark in module["test_step"].pytestmark if mark.name == "parametrize"]
    assert [name for name in module if name.startswith("test_")] == ["test_step"]
    order = mark.args[1]
    assert order == sorted(
        order, key=lambda each: each[0] == "cuda"
    )  # as tests/conftest.py sorts them on a GPU
    steps = list(first_run.STEPS)
    by_cuda = [name for backend, name in order if backend == "cuda"]
    forward = [name for name in steps if not first_run.STEPS[name].backward]
    backward = [name for name in steps if first_run.STEPS[name].backward]
    assert by_cuda == forward + backward
    for backend in ("triton", "torch"):
        ran = [name for each, name in order if each == backend]
        assert ran == [name for name in forward + backward if name[0] not in "89"]
    assert len(order) == len(by_cuda) + 2 * len(ran)


def test_what_a_step_raises_is_its_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        RuntimeError("CUDA error: misaligned address"),
        ValueError("x"),
        AssertionError("y"),
        OSError("z"),
    ):
        monkeypatch.setattr(
            kernel_runs, "backend_for", lambda device, name, error=error: (_ for _ in ()).throw(error)
        )
        (item,) = first_run.run_step("1", CPU, Scale.of(CPU))
        assert item["status"] == "failed"
        assert type(error).__name__ in item["detail"]


def test_a_stuck_step_costs_its_own_time_and_a_crashed_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from measure import processes; import time, os\n"
    commands = {
        "1": [sys.executable, "-c", sleeps + "processes.announce(1, 'step 1'); time.sleep(600)"],
        "2": [sys.executable, "-c", sleeps + "print('began', flush=True); os.kill(os.getpid(), 6)"],
        "3": [
            sys.executable,
            "-c",
            'print(\'{"check": "first-run", "status": "passed", "detail": "fine"}\')',
        ],
        "4": "there is none",
    }
    monkeypatch.setattr(first_run, "_command", lambda name, device, launches, backend: commands[name])
    started = time.monotonic()
    found = list(first_run.run_all(["1", "2", "3", "4"], "cpu", 2, 60.0))
    assert time.monotonic() - started < 40
    assert [item["status"] for item in found] == ["failed", "failed", "passed", "skipped"]
    assert "silent for 1 s in step 1" in found[0]["detail"]
    assert "ended with status -6; began" in found[1]["detail"]
    late = list(first_run.run_all(["1"], "cpu", 2, 1.0))
    assert [item["status"] for item in late] == ["not run"]


@pytest.mark.exhaustive
def test_one_command_runs_all_of_it() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "first_run.py"), "--device", "cpu", "--forward"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    items = [json.loads(line) for line in done.stdout.splitlines()]
    assert {item["step"] for item in items} == {n for n, step in first_run.STEPS.items() if not step.backward}
    assert {item["status"] for item in items} == {"passed", "skipped"}


def test_the_sanitizer_runs_the_small_steps_under_each_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_run, "sanitizer", lambda: None)
    assert first_run._command("8", "cuda", 2) == "compute-sanitizer is not installed"
    monkeypatch.setattr(first_run, "sanitizer", lambda: "compute-sanitizer")
    line = first_run._command("8b", "cuda", 2)[-1]
    assert [word for word in line.split() if word.endswith("check")] == list(first_run.SANITIZER_TOOLS)
    assert line.count("--step 3 --step 5b") == 3


@pytest.mark.parametrize("name", probes.DIRECTIONS)
def test_every_probe_passes_where_the_kernels_are_right(name: str) -> None:
    assert "of what is allowed" in probes.DIRECTIONS[name].probe(backends.torch_backend, CPU)


def test_a_probe_has_fifteen_seconds_from_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced after the import, before anything is launched."""
    said: list[Any] = []
    monkeypatch.setattr(probes.processes, "announce", lambda seconds, what: said.append((seconds, what)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    direction = probes.Direction(lambda ops, device: said.append("launched") or "fine", ())
    monkeypatch.setitem(probes.DIRECTIONS, "softmax", direction)
    assert probes.probe_here("softmax", CPU)["status"] == "passed"
    assert said == [(15.0, "softmax"), "launched"]


@pytest.mark.parametrize("name", probes.DIRECTIONS)
def test_every_probe_sees_wrong_numbers(name: str) -> None:
    class Off:
        def __getattr__(self, part: str) -> Any:
            right = getattr(backends.torch_backend, part)
            return lambda *args: _scaled(right(*args))

    with pytest.raises(probes.Wrong, match="of what is allowed"):
        probes.DIRECTIONS[name].probe(Off(), CPU)


def _scaled(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return made * 1.1
    parts = [part * 1.1 if isinstance(part, torch.Tensor) else part for part in made]
    return type(made)(*parts) if hasattr(made, "_fields") else tuple(parts)


FAKE = """
import json, os, sys, time
sys.path.insert(0, FOLDER)
from measure import processes
name = sys.argv[-1]
print("ready", flush=True)
sys.stdin.readline()
processes.announce(2, name)
if name == "backward one pass":
    time.sleep(600)
if name == "softmax":
    os.kill(os.getpid(), 11)
status = "skipped" if name == "cross-entropy" else "passed"
print(json.dumps({"check": "probe", "status": status, "detail": "", "backend": "cuda", "direction": name}))
"""


def test_a_direction_that_hangs_or_crashes_is_switched_off_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = time.monotonic()
    found = probes.probe_all("cpu", [sys.executable, "-c", FAKE.replace("FOLDER", repr(str(BENCHMARKS)))])
    assert time.monotonic() - started < 30
    statuses = {item["direction"]: item["status"] for item in found}
    assert statuses == {
        "forward": "passed", "forward in clusters": "passed", "softmax": "failed", "cross-entropy": "skipped",
        "backward two passes": "passed", "backward one pass": "failed",
    }  # fmt: skip
    assert "silent for 2 s in backward one pass" in found[-1]["detail"]
    assert "status -11" in found[2]["detail"]
    assert probes.switches_for(found) == "cuda.softmax_fwd,cuda.softmax_bwd,cuda.one_pass"
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith('{"check"')]) == 6


def test_what_was_not_tried_is_switched_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {switch for direction in probes.DIRECTIONS.values() for switch in direction.switches}
    assert set(probes.switches_for([]).split(",")) == everything
    for switch in everything:
        monkeypatch.setenv("FASTATTN_DISABLE", switch)
        assert backends.switched_off("cuda", switch.partition(".")[2]) is not None


def test_held_blocks_go_on_until_they_are_let_go() -> None:
    """Interpreted, one block after another: each ends at a set flag, or when it has looked enough."""
    pytest.importorskip("triton")
    from evidence import hold

    for flag, looks in ((1, hold.MOST_LOOKS), (0, 5)):
        stop, ended = torch.tensor([flag], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        hold.hold_kernel[(3,)](stop, ended, looks, num_warps=hold.WARPS)
        assert ended.item() == 3
