"""The checks of a device: they find what is wrong, whatever a call raises; one that is stuck costs itself alone."""

from __future__ import annotations

import argparse
import ast
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from evidence import attention_checks, checks, op_checks
from evidence.findings import backends_here, only_backends
from fastattn import reference
from inputs.random_attention import FEW, RandomCall
from measure import errors

CPU = torch.device("cpu")
PASSED = json.dumps({"check": "random", "status": "passed", "detail": "", "backend": "torch"})


@pytest.fixture
def only_torch() -> Iterator[None]:
    only_backends(["torch"])
    yield
    only_backends([])


SEED = 70  # draws windows of one key, whose scores have no gradient but rounding


def test_every_check_passes_on_the_cpu(only_torch: None) -> None:
    for name, check in checks.CHECKS.items():
        findings = list(check(torch.device("cpu"), 0.5, SEED))
        assert {finding["status"] for finding in findings} <= {"passed", "skipped"}, (name, findings)
        assert name == "int64-offsets" or findings[-1]["status"] == "passed"


def test_a_wrong_backend_is_found(only_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastattn

    right = fastattn.attention

    def wrong(query: torch.Tensor, *args: Any, **options: Any) -> Any:
        out, lse = right(query, *args, **options)
        return out * 1.01, lse

    monkeypatch.setattr(fastattn, "attention", wrong)
    findings = list(checks.CHECKS["random"](torch.device("cpu"), 1.0, 0))
    assert findings[-1]["status"] == "failed"
    assert "of what is allowed" in findings[0]["detail"]


def test_a_wrong_op_is_found(only_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastattn

    right = fastattn.softmax
    monkeypatch.setattr(fastattn, "softmax", lambda x, **options: right(x, **options) * 1.1)
    findings = list(op_checks.check_ops(torch.device("cpu"), 3.0, 0))
    failed = {finding["detail"].split(":")[0] for finding in findings if finding["status"] == "failed"}
    assert failed == {"softmax"}
    summaries = {f["detail"].split(":")[0]: f["status"] for f in findings if f.get("summary")}
    assert summaries == {name: "failed" if name == "softmax" else "passed" for name in op_checks.OPS}


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (attention_checks, "random"),
        (attention_checks, "kv-cache"),
        (op_checks, "ops-varlen"),
        (op_checks, "ops-softmax"),
    ],
)
@pytest.mark.parametrize(("ratio", "status"), [(1.0, "passed"), (1.01, "failed"), (math.inf, "failed")])
def test_the_bound_is_the_rule(
    module: Any, check: str, ratio: float, status: str, only_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ratios_of", lambda *results: {"out": 0.5, "lse": ratio})
    findings = list(checks.CHECKS[check](CPU, 0.05, 0))
    assert {finding["status"] for finding in findings} == {status}


def test_a_row_of_one_key_is_judged_by_its_terms() -> None:
    """Plain torch has no error there; a kernel that subtracts two sums has theirs, and no more."""
    golden = torch.zeros(3, dtype=torch.float64)
    terms = {"dkey": torch.tensor([1.0, 8.0, 2.0], dtype=torch.float64)}
    eps = torch.finfo(torch.float32).eps
    for error, within in ((8 * eps, True), (9 * eps, False)):
        results = {"dkey": golden.float() + error}, {"dkey": golden.float()}, {"dkey": golden}
        for dtype in (torch.float32, torch.bfloat16):
            ratios = errors.ratios_of(*results, dtype, lambda: {"dkey": golden.float()}, terms)
            assert (ratios["dkey"] <= 1) is within


def test_the_terms_of_a_call_are_of_its_rows_of_one_key() -> None:
    seen: Counter[str] = Counter()
    for seed in range(64):
        call = RandomCall(seed, CPU, 70)
        terms = call.cancelling_terms()
        if not terms or "dropout_p" in call.options:
            continue
        assert terms["dquery"].shape == call.operands["query"].shape
        assert terms["dkey"].shape == call.operands["key"].shape
        if set(call.options) == {"causal"} and call.options["causal"] and call.seqlen_q == call.seqlen_k:
            assert terms["dquery"][:, :, 0].any()  # the first query sees the first key
            assert not terms["dquery"][:, :, 1:].any()
            assert not terms["dkey"][:, :, 1:].any()
            seen["causal"] += 1
    assert seen["causal"]


def test_gradients_of_few_numbers_are_judged_by_their_terms() -> None:
    """Slopes, sinks and biases of fewer than FEW numbers are drawn, and an error of their terms' size is found."""
    seen: Counter[str] = Counter()
    for seed in range(0, 16 * 120, 16):  # a kind of call each
        call = RandomCall(seed, CPU, 17)
        terms = {n: t for n, t in call.cancelling_terms().items() if n not in ("dquery", "dkey")}
        few = {
            n
            for n in ("bias", "alibi_slopes", "sinks")
            if n in call.options and call.options[n].numel() < FEW
        }
        assert terms.keys() == {f"d{n}" for n in few}
        if not few:
            continue
        golden = call.run(reference.attention, torch.float64)
        plain = call.run(reference.attention, call.dtype)
        actual = call.run(fastattn.attention, call.dtype, backend="torch")
        for name, of_name in terms.items():
            assert of_name.shape == golden[name].shape
            # a gradient is at most the sum of its terms' absolute values
            assert (of_name * (1 + 1e-9) >= golden[name].abs()).all() or "dropout_p" in call.options
            assert errors.excess(actual[name], plain[name], golden[name], call.dtype, of_name) <= 1
            wrong = golden[name] + of_name / 8
            seen[name] += errors.excess(wrong, plain[name], golden[name], call.dtype, of_name) > 1
    assert all(seen[f"d{n}"] for n in ("bias", "alibi_slopes", "sinks")), seen


def options(**changes: Any) -> argparse.Namespace:
    chosen = {
        "seconds": 1.0,
        "device": "cpu",
        "seed": 7,
        "workers": 1,
        "backends": [],
        "here": False,
        **changes,
    }
    return argparse.Namespace(**chosen)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a program the one that checks are run by; it sees `seed` and `backends`."""
    folder = str(checks.SCRIPT.parent)

    def use(body: str) -> None:
        path = tmp_path / "checks.py"
        start = f"import sys, time, os\nsys.path.insert(0, {folder!r})\nfrom measure import processes\n"
        start += "seed = int(sys.argv[sys.argv.index('--seed') + 1])\n"
        start += (
            "backends = sys.argv[sys.argv.index('--backends') + 1:] if '--backends' in sys.argv else []\n"
        )
        path.write_text(start + body)
        monkeypatch.setattr(checks, "SCRIPT", path)

    return use


def test_workers_report_and_a_lost_one_is_a_failure(script: Any) -> None:
    script(f"print({PASSED!r})\nsys.exit(3 if seed > 7 else 0)\n")
    findings = list(checks.in_processes(["random"], options(workers=2)))
    assert sorted(finding["status"] for finding in findings) == ["failed", "passed", "passed"]
    (failed,) = [finding for finding in findings if finding["status"] == "failed"]
    assert failed["detail"] == "process 1 ended with status 3"


def test_a_stuck_call_costs_its_backend_and_the_check_goes_on_without_it(script: Any) -> None:
    script(f"""
if seed < 100:
    print({PASSED!r}, flush=True)
    processes.announce(1, "random cuda: B1 H2")
    time.sleep(600)
print({PASSED!r}.replace('torch', ' '.join(backends)))
""")
    started = time.monotonic()
    found = list(checks.in_processes(["random"], options(seconds=30.0, backends=["cuda", "triton", "torch"])))
    assert time.monotonic() - started < 30
    assert [item["status"] for item in found] == ["passed", "failed", "passed"]
    assert found[1]["backend"] == "cuda"
    assert "silent for 1 s in random cuda: B1 H2" in found[1]["detail"]
    assert found[2]["backend"] == "triton torch"


def test_findings_come_as_they_are_made(script: Any) -> None:
    script(f"print({PASSED!r}, flush=True)\ntime.sleep(1.5)\nprint({PASSED!r})\n")
    times = [time.monotonic() for _ in checks.in_processes(["random"], options())]
    assert times[1] - times[0] > 1.0


def _triton_errors() -> list[Exception]:
    """What a launch raises that the device has no room for, and one that does not compile: no RuntimeError."""
    if find_spec("triton") is None:
        return []
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    source = "x = 1"
    return [
        OutOfResources(300_000, 232_448, "shared memory"),
        CompilationError(source, ast.parse(source).body[0], "nothing"),
    ]


RAISED = [AssertionError(), KeyError("x"), RuntimeError("out of resource")]
RAISED += _triton_errors()


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_call_raises_is_its_finding_and_the_check_goes_on(
    error: Exception, only_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastattn

    calls = {"attention": 0, "softmax": 0}
    for name in calls:
        right = getattr(fastattn, name)

        def sometimes(*args: Any, name: str = name, right: Any = right, **given: Any) -> Any:
            calls[name] += 1
            if calls[name] == 2:
                raise error
            return right(*args, **given)

        monkeypatch.setattr(fastattn, name, sometimes)
    for check in (attention_checks.check_random, checks.CHECKS["ops-softmax"]):
        found = list(check(CPU, 0.3, 0))
        raised = [item for item in found if type(error).__name__ in item["detail"]]
        assert [item["status"] for item in raised] == ["failed"]
        assert found[-1]["status"] == "failed"
        assert int(found[-1]["detail"].replace("softmax: ", "").split()[0]) > 1  # others were made after it
    assert min(calls.values()) > 2


def test_a_lost_device_ends_the_process_and_the_rest_is_said_to_be_not_run(
    only_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastattn

    def lost(*args: Any, **given: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    monkeypatch.setattr(fastattn, "attention", lost)
    found = list(checks.run_here(["random", "bitwise", "int64-offsets"], options(seconds=5.0)))
    assert [(item["check"], item["status"]) for item in found] == [
        ("random", "failed"), ("bitwise", "not run"), ("int64-offsets", "not run")
    ]  # fmt: skip
    assert "the device is lost" in found[0]["detail"]


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, seconds: float, seed: int) -> Iterator[Any]:
        raise TypeError("no such option")
        yield {}

    monkeypatch.setitem(checks.CHECKS, "random", broken)
    found = list(checks.run_here(["random", "int64-offsets"], options()))
    assert [item["status"] for item in found] == ["failed", "skipped"]


def test_a_forward_is_judged_alone_where_the_backward_is_switched_off(
    only_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_DISABLE", "torch.attention_bwd")
    found = list(attention_checks.check_random(CPU, 1.0, 0))
    assert found[-1]["status"] == "passed"
    assert found[-1]["detail"].endswith("of them without gradients")


def test_a_call_is_told_in_one_line() -> None:
    for seed in range(40):
        assert "\n" not in RandomCall(seed, CPU, 70).describe()


def test_the_extension_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn import backends

    for backend in backends.BACKENDS:
        monkeypatch.setattr(backend, "why_not", lambda spec: None)
    assert backends_here(CPU) == ["triton", "torch", "cuda"]
    only_backends(["cuda", "torch"])
    assert backends_here(CPU) == ["torch", "cuda"]
    only_backends([])


def test_the_groups_are_of_checks() -> None:
    assert {name for names in checks.GROUPS.values() for name in names} < set(checks.CHECKS)
    assert len(checks.GROUPS["ops"]) == len(op_checks.OPS)


def test_a_backend_that_does_not_run_here_is_said_so() -> None:
    only_backends(["cuda"])
    found = list(checks.run_here(["random", "bitwise"], options(backends=["cuda"])))
    only_backends([])
    assert [(item["status"], item["detail"]) for item in found] == [
        ("skipped", "cuda: no such backend runs here")
    ] * 2


def test_checks_of_a_group_run_side_by_side(script: Any) -> None:
    script(f"time.sleep(1.5)\nprint({PASSED!r}.replace('random', sys.argv[1]))\n")
    started = time.monotonic()
    found = list(checks.run(["random", "kv-cache", "ops-varlen", "ops-softmax"], options(workers=4)))
    assert time.monotonic() - started < 8.5  # one after another takes 9
    counts = Counter(item["check"] for item in found)
    assert counts == {"random": 2, "kv-cache": 2, "ops-varlen": 1, "ops-softmax": 1}
