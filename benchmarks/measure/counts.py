"""Counts of work that do not depend on the machine; counts.json records them.

For the torch backend: aten operators, bytes allocated and the peak of those alive. For the Triton kernels: launches,
programs, bytes allocated around them, and matrix products executed by mask. Also the tiles visited by mask, the
operators of a decoding step and of a module, and the Python functions that a call of each op enters, on the torch
backend and, without the launches, on the Triton backend.
tests/kernels/compile_table.json has registers, shared memory and spills.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads; silences its profiler's log

import torch
from torch import Tensor

import checkout
from report import schema

FORMAT, VERSION = "fastattn-counts", 1
FILE = checkout.BENCHMARKS / "counts.json"
RECORD = "python benchmarks/counts.py --record"
Counts = dict[str, Any]
Call = Callable[[], Any]

WARM = 3  # calls until a plan runs: the second call of a kind makes it
HEADS, LENGTH, HEAD_DIM = 4, 256, 64
SMALL_LENGTH, SMALL_DIM = 160, 16  # of calls that the interpreter executes


def measure() -> Counts:
    """Every count, by group and case."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), _on_one_processor():
            warnings.simplefilter("ignore")
            return {
                "torch backend": {name: operators(call) for name, call in _attention_calls().items()},
                "tiles visited": {name: _tiles_visited(options) for name, options in _masks(2048).items()},
                "models": _models(),
                "triton launches": {name: launches(call) for name, call in _triton_calls().items()},
                "python calls": {
                    name: {"calls": python_calls(call)} for name, call in _python_calls().items()
                },
                "python calls before triton": {
                    name: _calls_before_triton(call) for name, call in _launching_calls().items()
                },
                "triton products": {n: _products_executed(o) for n, o in _masks(SMALL_LENGTH).items()},
            }
    finally:
        torch.set_num_threads(before)


@contextmanager
def _on_one_processor() -> Iterator[None]:
    """Kernels are chosen as on one processor with AVX-512, whichever this one is."""
    from fastattn import torch_compat
    from fastattn.ops import plan

    chosen = {
        "has_mkl_on_intel": False, "has_matrix_instructions": False, "prefers_mkl": True, "instructions": "AVX512",
    }  # fmt: skip
    with ExitStack() as replaced:
        replaced.callback(plan.clear)
        for name, value in chosen.items():
            # without a Python function that would be counted
            replaced.enter_context(_replaced(torch_compat, name, repeat(value).__next__))
        plan.clear()  # those that were made before
        yield


def _python_calls() -> dict[str, Call]:
    """A small call of each op, forward and with its gradients."""
    import fastattn

    q, k, v = (_normal(1, 2, 16, 16) for _ in range(3))
    packed_q, packed_k, packed_v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    cu_seqlens, target = torch.tensor([0, 8, 16], dtype=torch.int32), torch.arange(16)
    new, lengths = _normal(1, 2, 1, 16), torch.tensor([15], dtype=torch.int32)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    rows, weight = _normal(16, 32), _normal(64, 32)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    leaf = rows.clone().requires_grad_()
    return {
        "attention": lambda: fastattn.attention(q, k, v, causal=True),
        "attention, gradients": lambda: fastattn.attention(*leaves, causal=True).sum().backward(),
        "attention, mask": lambda: fastattn.attention(q, k, v, mask=mask),
        "varlen": lambda: fastattn.attention_varlen(packed_q, packed_k, packed_v, cu_seqlens, cu_seqlens),
        "kv_cache": lambda: fastattn.attention_kv_cache(new, k, v, lengths, key=new, value=new),
        "softmax": lambda: fastattn.softmax(rows),
        "softmax, gradients": lambda: fastattn.softmax(leaf).backward(rows),
        "cross_entropy": lambda: fastattn.cross_entropy(rows, target),
        "linear_cross_entropy": lambda: fastattn.linear_cross_entropy(rows, weight, target),
    }


def _launching_calls() -> dict[str, Call]:
    """A small call of each op that has kernels, forward and with its gradients."""
    import fastattn

    half = torch.float16
    q, k, v = (_normal(1, 2, 16, 16, dtype=half) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    packed = [t.transpose(1, 2).flatten(0, 1).requires_grad_() for t in (q, k, v)]
    cu_seqlens, target = torch.tensor([0, 8, 16], dtype=torch.int32), torch.arange(16)
    new, lengths = _normal(1, 2, 1, 16, dtype=half), torch.tensor([15], dtype=torch.int32)
    mask, bias = torch.ones(16, 16, dtype=torch.bool).tril(), _normal(2, 16, 16, dtype=half, grad=True)
    rows = _normal(16, 32, dtype=half, grad=True)

    def varlen(*x: Tensor) -> Any:
        query, key, value = x
        return fastattn.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, 8, 8, causal=True)

    return {
        "attention": lambda: fastattn.attention(q, k, v, causal=True),
        "attention, gradients": _both(lambda *x: fastattn.attention(*x, causal=True), *leaves),
        "attention, mask": lambda: fastattn.attention(q, k, v, mask=mask),
        "attention, mask, gradients": _both(lambda *x: fastattn.attention(*x, mask=mask), *leaves),
        "attention, bias with its gradient": _both(lambda *x: fastattn.attention(*x[:3], bias=x[3]), *leaves, bias),
        "attention, one query": lambda: fastattn.attention(new, k, v),
        "varlen": lambda: varlen(*(t.detach() for t in packed)),
        "varlen, gradients": _both(varlen, *packed),
        "kv_cache": lambda: fastattn.attention_kv_cache(new, k, v, lengths, key=new, value=new),
        "softmax": lambda: fastattn.softmax(rows.detach()),
        "softmax, gradients": _both(lambda x: fastattn.softmax(x), rows),
        "cross_entropy": lambda: fastattn.cross_entropy(rows.detach(), target),
        "cross_entropy, gradients": _both(lambda x: fastattn.cross_entropy(x, target), rows),
    }  # fmt: skip


def _calls_before_triton(call: Call) -> Counts:
    """Python functions of fastattn that a call enters, without those that launch, and its launches, none of which is
    executed. On a CPU values are checked too; on a GPU that would synchronise."""
    from fastattn.kernels.arguments import Launch

    made: list[Any] = []
    with _through_triton(), _replaced(Launch, "start", lambda launch: made.append(launch)):
        for _ in range(WARM):
            call()
        made.clear()
        call()
        launched = len(made)
        entered = python_calls(call)
    return {"calls": entered, "launches": launched}


def python_calls(call: Call) -> int:
    """How many functions of fastattn a call enters, without comprehensions, which newer Pythons inline."""
    import fastattn

    package = str(Path(fastattn.__file__).parent) + os.sep
    for _ in range(WARM):
        call()
    entered = 0

    def watch(frame: FrameType, event: str, arg: object) -> None:
        nonlocal entered
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and code.co_name[0] != "<":
            entered += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def operators(call: Call) -> Counts:
    """aten operators a call runs, bytes it allocates in all, and the peak of those alive at once."""
    call()  # set-up of the first call does not count
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = call()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: int(event.start_ns()))
    changes = [int(event.nbytes()) for event in events if event.name() == "[memory]"]
    del result
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    aten = sum(event.name().startswith("aten::") for event in events)
    return {"operators": aten, "allocated": sum(c for c in changes if c > 0), "peak": peak}


def launches(call: Call) -> Counts:
    """The Triton kernels a call launches, their programs, and the bytes allocated around them; none is executed."""
    from fastattn.kernels.arguments import Launch

    with _through_triton_unexecuted():
        allocated = operators(call)["allocated"]
    made: list[str] = []
    with _through_triton(), _replaced(Launch, "start", lambda launch: made.append(_named(launch))):
        call()
    return {"launches": made, "allocated": allocated}


def _named(launch: Any) -> str:
    programs = 1
    for size in launch.grid:
        programs *= int(size)
    return f"{launch.kernel.fn.__name__} x {programs}"


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _through_triton() -> Iterator[None]:
    before = os.environ.get("FASTATTN_BACKEND")
    os.environ["FASTATTN_BACKEND"] = "triton"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTATTN_BACKEND"]
        else:
            os.environ["FASTATTN_BACKEND"] = before


def _masks(length: int) -> dict[str, dict[str, Any]]:
    """Options of attention that leave out a part of the scores."""
    packed = torch.arange(length).mul(8).div(length, rounding_mode="floor").int()[None]
    return {
        "full": {},
        "causal": {"causal": True},
        "window": {"window": (length // 8 - 1, 0)},
        "documents": {"segment_ids": packed},
        "causal documents": {"segment_ids": packed, "causal": True},
        "key lengths": {"key_lengths": torch.tensor([length // 4], dtype=torch.int32)},
    }


def _normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def _both(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """A call with the gradient of every input."""
    upstream_grad = torch.ones_like(function(*inputs).detach())
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream_grad)


def _attention_calls(dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """Forward without gradients, and both directions, of attention with each of its options."""
    from fastattn import attention

    options = {
        **_masks(LENGTH),
        "bias": {"bias": _normal(1, HEADS, LENGTH, LENGTH, dtype=dtype)},
        "bool mask": {"mask": torch.rand(1, 1, LENGTH, LENGTH) < 0.9},
        "alibi": {"causal": True, "alibi_slopes": torch.ones(HEADS)},
        "softcap": {"causal": True, "softcap": 20.0},
        "sinks": {"causal": True, "sinks": torch.zeros(HEADS)},
        "dropout": {"dropout_p": 0.1, "dropout_seed": 3},
    }
    shape = (1, HEADS, LENGTH, HEAD_DIM)
    frozen = [_normal(*shape, dtype=dtype) for _ in range(3)]
    leaves = [_normal(*shape, dtype=dtype, grad=True) for _ in range(3)]
    grouped = [leaves[0], *(_normal(1, 1, LENGTH, HEAD_DIM, dtype=dtype, grad=True) for _ in range(2))]
    calls: dict[str, Call] = {}
    for name, chosen in options.items():
        calls[f"attention, {name}"] = lambda o=chosen: attention(*frozen, **o)  # type: ignore[misc]
        calls[f"attention, {name}, with gradients"] = _both(lambda *x, o=chosen: attention(*x, **o), *leaves)
    calls["attention, grouped heads, with gradients"] = _both(
        lambda *x: attention(*x, causal=True),
        *grouped,
    )
    bias = _normal(1, HEADS, LENGTH, LENGTH, dtype=dtype, grad=True)
    calls["attention, bias with its gradient"] = _both(
        lambda *x: attention(*x[:3], bias=x[3]),
        *leaves,
        bias,
    )
    return {**calls, **_other_calls(dtype)}


def _other_calls(dtype: torch.dtype) -> dict[str, Call]:
    """Packed sequences, a cache, softmax and the losses."""
    import fastattn

    cu_seqlens = torch.tensor([0, 40, LENGTH], dtype=torch.int32)
    packed = [_normal(LENGTH, HEADS, HEAD_DIM, dtype=dtype, grad=True) for _ in range(3)]
    query, new = (_normal(2, HEADS, 1, HEAD_DIM, dtype=dtype) for _ in range(2))
    k_cache, v_cache = (_normal(2, HEADS, LENGTH, HEAD_DIM, dtype=dtype) for _ in range(2))
    held = torch.tensor([100, LENGTH - 2], dtype=torch.int32)
    rows, wide = _normal(64, 1000, dtype=dtype, grad=True), _normal(2, 40_000, dtype=dtype, grad=True)
    # of float32: processors with matrix instructions for 16 bits allocate more memory around such products
    hidden, weight = _normal(64, 32, grad=True), _normal(1000, 32, grad=True)
    target = torch.arange(64)

    def varlen(*x: Tensor) -> Any:
        query, key, value = x
        return fastattn.attention_varlen(
            query, key, value, cu_seqlens, cu_seqlens, LENGTH, LENGTH, causal=True
        )

    def losses(x: Tensor) -> Tensor:
        return fastattn.cross_entropy(x, target)

    def linear_losses(x: Tensor, w: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(x, w, target)

    return {
        "attention_varlen": lambda: varlen(*(t.detach() for t in packed)),
        "attention_varlen, with gradients": _both(varlen, *packed),
        "attention_kv_cache": lambda: fastattn.attention_kv_cache(
            query, k_cache, v_cache, held, key=new, value=new
        ),
        "softmax, with gradients": _both(lambda x: fastattn.softmax(x), rows),
        "softmax of long rows, with gradients": _both(lambda x: fastattn.softmax(x), wide),
        "cross_entropy, with gradients": _both(losses, rows),
        "linear_cross_entropy, with gradients": _both(linear_losses, hidden, weight),
    }


def _triton_calls() -> dict[str, Call]:
    with _through_triton_unexecuted():
        return _attention_calls(torch.float16)


@contextmanager
def _through_triton_unexecuted() -> Iterator[None]:
    from fastattn.kernels.arguments import Launch

    with _through_triton(), _replaced(Launch, "start", lambda launch: None):
        yield


def _tiles_visited(options: dict[str, Any]) -> Counts:
    """Tiles of the torch backend's fused path at 2048 positions, and the pairs of a query and a key they hold."""
    from fastattn.backends.torch.parts import parts

    call = _call_of(_normal(1, 1, 2048, 8), options)
    tiles = [t for part in parts(call) for row in part.schedule(True) for t in row]
    pairs = sum(len(tile.rows) * len(tile.cols) for tile in tiles)
    halves = sum(len(t.rows) * (len(t.rows) - 1) // 2 for t in tiles if t.structure == "causal")
    return {"tiles": len(tiles), "pairs": pairs - halves}


def _call_of(tensor: Tensor, options: dict[str, Any]) -> Any:
    """The call that the op hands to a backend."""
    from fastattn.ops import arguments
    from fastattn.spec import AttentionCall

    return AttentionCall(*arguments.call_arguments(tensor, tensor, tensor, **options))


def _products_executed(options: dict[str, Any]) -> Counts:
    """Matrix products of tiles that the interpreted kernels execute at 160 positions, forward and in all."""
    from triton.runtime.interpreter import InterpreterBuilder

    from fastattn import attention

    made = [0]
    original = InterpreterBuilder.create_dot

    def counted(builder: Any, *args: Any) -> Any:
        made[0] += 1
        return original(builder, *args)

    inputs = [_normal(1, 1, SMALL_LENGTH, SMALL_DIM, grad=True) for _ in range(3)]
    with _through_triton(), _replaced(InterpreterBuilder, "create_dot", counted):
        out = attention(*inputs, **options)
        forward = made[0]
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return {"forward": forward, "with gradients": made[0]}


def _models() -> Counts:
    """A decoding step of a small GPT, as the difference of two generations, and a module with and without gradients."""
    from fastattn import MultiHeadAttention
    from fastattn.models import GPT, GPTConfig

    config = GPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=512, eos_token_id=None)
    model = GPT(config).eval()
    prompt = torch.arange(12)[None]
    few, more = (operators(lambda n=n: model.generate(prompt, max_new_tokens=n)) for n in (6, 7))  # type: ignore[misc]
    step = {name: more[name] - few[name] for name in ("operators", "allocated")}
    module = MultiHeadAttention(64, 4, batch_first=True)
    x = _normal(2, 32, 64, grad=True)

    def attend(x: Tensor) -> Tensor:
        out: Tensor = module(x, x, x, need_weights=False)[0]
        return out

    def frozen() -> Tensor:
        with torch.no_grad():
            return attend(x)

    return {
        "decoding step of two GPT layers": step,
        "MultiHeadAttention": operators(frozen),
        "MultiHeadAttention, with gradients": operators(_both(attend, x)),
    }


def record(counts: Counts) -> None:
    """Write counts.json."""
    stored = {"format": FORMAT, "version": VERSION, "torch": release(torch.__version__), "counts": counts}
    schema.replace_file(FILE, json.dumps(stored, indent=1) + "\n")


def recorded() -> Counts:
    """counts.json; ValueError where it is of another version."""
    stored: Counts = json.loads(FILE.read_text(encoding="utf-8"))
    if (stored.get("format"), stored.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{FILE.name}: needs {FORMAT!r}, {VERSION}; {RECORD}")
    return stored


def differences(stored: Counts, counts: Counts, torch_version: str = torch.__version__) -> list[str]:
    """A line for every count that is not as recorded; those of TORCH_DECIDES only in the recorded torch."""
    lines = []
    same_torch = stored["torch"] == release(torch_version)
    for group in {**stored["counts"], **counts}:
        if group in TORCH_DECIDES and not same_torch:
            continue
        before, now = _flat(stored["counts"].get(group, {})), _flat(counts.get(group, {}))
        for name in {**before, **now}:
            if not same_torch and name.endswith(": allocated"):
                continue
            if before.get(name) != now.get(name):
                lines.append(f"{group}: {name}: was {before.get(name)}, is {now.get(name)}")
    return lines


TORCH_DECIDES = ("torch backend", "models", "python calls", "python calls before triton")


def _flat(cases: Counts) -> dict[str, Any]:
    return {f"{case}: {name}": value for case, found in cases.items() for name, value in found.items()}


def release(torch_version: str) -> str:
    """2.13 of 2.13.0+cpu."""
    return ".".join(torch_version.split(".")[:2])
