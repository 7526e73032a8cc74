"""Replays through Triton's interpreter: the bits of calls without plans, for other values than those recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_cases import BY_OP, OPTIONS, attended, linear_loss, loss, packed, with_grads
from plan_cases import assert_same as assert_same_bits
from plan_cases import heads as more_heads
from replay_calls import OPS, described, graded, launched, noted, requiring, without_plan
from torch import Tensor

import fastattn
from fastattn.backends import replay
from fastattn.kernels import arguments, decode_tiles, jit
from fastattn.ops import plan
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded

pytestmark = pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND:RuntimeWarning")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of these tests are on the CPU")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[replay.Replay]:
    """Every replay that was recorded."""
    made: list[replay.Replay] = []
    record = replay.Replay._record

    def noting(self: replay.Replay, tensors: Any) -> Any:
        made.append(self)
        return record(self, tensors)

    monkeypatch.setattr(replay.Replay, "_record", noting)
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    monkeypatch.setattr(plan, "wanted", lambda key: key is not None)
    return made


def small(tensors: list[Tensor]) -> list[Tensor]:
    """One sequence, two query heads and one of keys; masks and ids of plan_cases are for 12 positions."""
    query, *others = tensors
    return [query[:1, :2], *(t[:1, :1] for t in others)]


def decoded(tensors: list[Tensor], pieces: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """A cache of several pages for each sequence, read in splits, and in pieces of the workspace if asked for."""
    query, keys, values = (t.repeat(2, 2, 1, 1) for t in tensors)
    caches = [torch.cat((t, t.flip(2), t + 1), 2).detach() for t in (keys, values)]
    lengths = torch.tensor([30, 34], dtype=torch.int32)
    new = {"key": keys[:, :, :2].detach(), "value": values[:, :, :2].detach()}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if pieces:
            patch.setattr(decode_tiles, "WORKSPACE_BYTES", 1)
        out, lse = fastattn.attention_kv_cache(
            query[:, :, :1], *caches, lengths, **new, return_lse=True, **options
        )
    return out, lse, *caches


# Every option of every op, those of attention with several passes of the backward among them.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{f"attention, {name}": (attended, OPTIONS[name]) for name in (
        "causal", "mask", "bias", "segments", "lengths", "slopes", "sinks", "dropout", "a drawn seed", "lse"
    )},
    **{name: BY_OP[name] for name in ("varlen", "softmax")},
    "varlen, slopes": (BY_OP["varlen"][0], {"alibi_slopes": torch.rand(3, 4)}),
    "kv_cache, splits": (decoded, {"num_splits": 2}),
    "kv_cache, pieces": (partial(decoded, pieces=True), {"num_splits": 3}),
    "kv_cache, rotary": (decoded, {"rotary_cos": torch.rand(64, 4), "rotary_sin": torch.rand(64, 4)}),
    "one query": (lambda t, **o: fastattn.attention(t[0][:, :, :1], *t[1:], **o), {}),
    "cross_entropy": (loss, {}),
    "cross_entropy, weighted": (loss, {"class_weight": torch.linspace(0.5, 2, 8), "z_loss": 0.1}),
    "cross_entropy, none": (loss, {"reduction": "none", "ignore_index": 3}),
    "linear_cross_entropy": (linear_loss, {}),
}  # fmt: skip
ONLY_FORWARD = ("kv_cache",)
NOT_REPLAYED = ("linear_cross_entropy",)


@INTERPRETED
@pytest.mark.parametrize("name", CASES)
def test_bits_of_a_replay_are_those_without(name: str, replays: list[replay.Replay]) -> None:
    call, options = CASES[name]
    grad, whole = not name.startswith(ONLY_FORWARD), call in (loss, linear_loss, packed)
    made = [more_heads(torch.float32) for _ in range(2)]
    if not whole:
        made, options = [small(tensors) for tensors in made], cut(options)
    made = [[t.clone().requires_grad_(grad) for t in tensors] for tensors in made]
    expected = with_grads(call, made[0], options)  # without a plan: this call makes it
    assert not replays
    with_grads(call, made[1], options)  # recorded
    assert_same_bits(with_grads(call, made[0], options), expected)
    if name.startswith(NOT_REPLAYED):
        return
    assert len(replays) == 1 + grad
    assert all(each.program is not None for each in replays), [each.refusal for each in replays]


def cut(options: dict[str, Any]) -> dict[str, Any]:
    """Options for one sequence and two heads."""
    made = dict(options)
    for name, few in (("bias", 2), ("sinks", 2), ("key_lengths", 1), ("segment_ids", 1)):
        if isinstance(made.get(name), Tensor):
            made[name] = made[name][:few]
    if isinstance(slopes := made.get("alibi_slopes"), Tensor) and slopes.dim() == 1:
        made["alibi_slopes"] = slopes[:2]
    return made


@pytest.mark.parametrize("op", OPS)
def test_threads_launch_on_their_own_tensors(op: str) -> None:
    call, make, leaves = OPS[op]
    failures: list[BaseException] = []
    local = threading.local()
    with noted() as found:
        expected = without_plan(found, call, requiring(make(), *leaves))

        def start(launch: Any) -> None:
            local.launches.append(launch)

        found.start = start  # type: ignore[method-assign]

        def work() -> None:
            try:
                mine = type(found)()
                for _ in range(6):
                    tensors = requiring(make(), *leaves)
                    local.launches = mine.launches
                    assert launched(mine, call, tensors) == expected
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def compiled_kernel(passed: list[tuple[Any, ...]]) -> Any:
    """What Triton returns of a launch."""

    class Compiled:
        function, packed_metadata = "function", "packed"

        def run(self, *args: Any) -> None:
            passed.append(args)

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: passed.append(("with hooks", grid, *args))

    return Compiled()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    stand_in = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 40 + device)
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)


@pytest.mark.newer_triton
def test_a_compiled_kernel_is_launched_directly(driver: None) -> None:
    passed: list[tuple[Any, ...]] = []
    launch = jit.launcher(compiled_kernel(passed), (7,))
    assert launch is not None
    x = torch.zeros(3)
    launch(x, None, 5)
    assert passed == [(7, 1, 1, 43, "function", "packed", None, None, None, x, None, 5)]


@pytest.mark.newer_triton
def test_hooks_of_profilers_see_direct_launches(driver: None) -> None:
    from triton import knobs

    passed: list[tuple[Any, ...]] = []
    launch = jit.launcher(compiled_kernel(passed), (7, 2))
    assert launch is not None
    chain = knobs.runtime.launch_exit_hook
    chain.add(print)
    try:
        launch(5)
    finally:
        chain.remove(print)
    launch(6)
    assert passed[0] == ("with hooks", (7, 2, 1), 5)
    assert passed[1][-1] == 6


def test_where_nothing_is_compiled_or_triton_differs_its_own_launcher_is_used(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jit.launcher(None, (1,)) is None
    monkeypatch.setattr(jit, "_interface_is_known", lambda: False)
    assert jit.launcher(compiled_kernel([]), (1,)) is None
    started: list[Any] = []
    monkeypatch.setattr(arguments.Launch, "start", lambda launch: started.append(launch))
    x = torch.zeros(3)
    launch = arguments.Launch(compiled_kernel([]), (4,), (x, 1), num_warps=2, num_stages=3)
    launch.starter(compiled_kernel([]))(x + 1, 2)
    (made,) = started
    assert made._replace(args=()) == launch._replace(args=())
    assert torch.equal(made.args[0], x + 1)
    assert made.args[1] == 2


@pytest.mark.newer_triton
@pytest.mark.parametrize(
    "wrong",
    [{"__getitem__": lambda self, grid: lambda *args, stream: self.run(*grid, *args)}, {"__getitem__": None}],
)
def test_another_interface_of_triton_is_not_used(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.compiler

    monkeypatch.setattr(triton.compiler, "CompiledKernel", type("Other", (), wrong))
    assert not jit._interface_is_known.__wrapped__()
    monkeypatch.undo()
    assert jit._interface_is_known.__wrapped__()


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Triton compiles everything to a kernel that notes its arguments."""
    passed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(arguments.Launch, "start", lambda launch: compiled_kernel(passed))
    monkeypatch.setattr(jit, "_interface_is_known", lambda: True)
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    return passed


@pytest.mark.newer_triton
@pytest.mark.parametrize("op", OPS)
def test_direct_launches_have_the_arguments_of_the_others(
    op: str, driver: None, launcher: list[tuple[Any, ...]]
) -> None:
    """Every parameter, constants and None included, in order, as Triton's launcher would have passed them."""
    call, make, leaves = OPS[op]
    tensors = requiring(make(), *leaves)
    with noted() as found:
        expected = without_plan(found, call, tensors)
    given: dict[str, Tensor] = {}
    for _ in range(4):
        launcher.clear()
        given = graded(call, tensors)
    assert len(launcher) == len(expected)
    assert described([args[9:] for args in launcher], {**tensors, **given}) == [
        args for _, _, args, _ in expected
    ]
    assert [args[: len(grid)] for args, (_, grid, _, _) in zip(launcher, expected)] == [
        grid for _, grid, _, _ in expected
    ]


@pytest.mark.parametrize("backward", [False, True])
def test_descriptors_for_tma_are_of_the_tensors_of_the_call(backward: bool) -> None:
    from fastattn.backends import triton as backend

    needs = GradsNeeded() if backward else None

    def run(query: Tensor, out: Tensor, lse: Tensor) -> Any:
        call = AttentionCall(query, query, query, scale=0.125)
        spec = AttentionSpec.of(call, needs).replace(arch=90)
        if needs is None:
            return backend.attention_fwd(spec, call)
        return backend.attention_bwd(spec, call, out, lse, out, None, needs)

    again = replay.Replay(run)
    with noted() as found:
        for _ in range(3):
            query, out = (torch.zeros(1, 4, 128, 128, dtype=torch.bfloat16) for _ in range(2))
            given = {"query": query, "out": out, "lse": torch.zeros(1, 4, 128)}
            launches = []
            for function in (run, again):
                function(*given.values())
                launches.append(found.take(given))
            assert launches[0] == launches[1]
            tensors = [arg for _, _, args, _ in launches[0] for arg in args if isinstance(arg[0], tuple)]
            assert len(tensors) == (8 if backward else 3)
    assert again.program is not None
