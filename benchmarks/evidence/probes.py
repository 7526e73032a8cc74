"""Which directions of the CUDA extension run on this GPU, each tried in a process of its own.

All processes start and import at the same time; then one after the other is told to launch, within LAUNCH_SECONDS. For
a direction that hangs, crashes or gives wrong numbers, the finding has the value of FASTATTN_DISABLE that switches it
off in later sections.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from types import ModuleType

import torch

import checkout
from evidence import kernel_runs
from evidence.findings import Finding, finding
from evidence.kernel_runs import NotThis, Operands
from measure import processes
from measure.errors import excess
from measure.processes import Ended, Process

CHECK = "probe"
START_SECONDS, LAUNCH_SECONDS = 60.0, 15.0
READY = "ready"
HEAD_DIMS = (64, 128, 256)
Probe = Callable[[ModuleType, torch.device], str]  # describes what passed; raises Wrong


class Wrong(AssertionError):
    """Numbers beyond the error rule."""


def _within(what: str, worst: float, name: str = "") -> str:
    text = f"{what}: {name}{' ' if name else ''}{worst:.2f} of what is allowed"
    if not worst <= 1.0:
        raise Wrong(text)
    return text


def probe_forward(ops: ModuleType, device: torch.device) -> str:
    """Full, partial and masked tiles, at every head dim."""
    said = []
    for dim in HEAD_DIMS:
        for length, causal in ((128, False), (200, True)):
            operands = Operands.draw(device, seqlen_q=length, head_dim=dim)
            worst, name = kernel_runs.worst_of(
                kernel_runs.forward(ops, operands, causal=causal), operands, causal=causal
            )
            said.append(_within(f"D{dim} S{length}", worst, name))
    return "; ".join(said)


def probe_clusters(ops: ModuleType, device: torch.device) -> str:
    """Calls without a mask at head dim 128, whose blocks multicast keys and values: an odd tile, several rounds."""
    said = []
    for batch, length in ((1, 300), (40 if device.type == "cuda" else 1, 512)):
        operands = Operands.draw(device, batch=batch, seqlen_q=length, head_dim=128)
        worst, name = kernel_runs.worst_of(kernel_runs.forward(ops, operands), operands)
        said.append(_within(f"B{batch} S{length}", worst, name))
    return "; ".join(said)


def probe_backward(ops: ModuleType, device: torch.device, number: int) -> str:
    """The backward in one pass or two, from a forward of float64."""
    said, refused = [], ""
    for dim in HEAD_DIMS:
        for length, causal in ((128, False), (200, True)):
            operands = Operands.draw(device, seqlen_q=length, head_dim=dim)
            made = kernel_runs.residuals(operands, causal=causal)
            try:
                with kernel_runs.passes(number):
                    grads = kernel_runs.backward(ops, operands, made, causal=causal)
            except NotThis as reason:
                refused = str(reason)
                continue
            worst, name = kernel_runs.worst_of(grads, operands, causal=causal)
            said.append(_within(f"D{dim} S{length}", worst, name))
    if not said:
        raise NotThis(refused)
    return "; ".join(said)


def probe_softmax(ops: ModuleType, device: torch.device) -> str:
    """Rows of one warp, of a block and of a cluster, forward and backward."""
    from fastattn.spec import SoftmaxCall, SoftmaxSpec

    said = []
    for columns in (256, 4096, 65_536 if device.type == "cuda" else 5000):
        generator = torch.Generator(device).manual_seed(columns)
        x, dout = (
            torch.randn(8, columns, generator=generator, device=device).to(kernel_runs.DTYPE)
            for _ in range(2)
        )
        call = SoftmaxCall(x, None, 1, 1.0, False, False, x.dtype)
        out = ops.softmax_fwd(SoftmaxSpec.of(x), call)
        dx = ops.softmax_bwd(SoftmaxSpec.of(dout, backward=True), dout, out, 1, 1.0, x.dtype)
        results = []
        for dtype in (torch.float64, x.dtype):
            leaf = x.to(dtype).requires_grad_()
            made = leaf.softmax(-1)
            results.append((made.detach(), torch.autograd.grad(made, leaf, dout.to(dtype))[0]))
        worst = max(excess(a, p, g, x.dtype) for a, g, p in zip((out, dx), *results))
        said.append(_within(f"{columns} columns", worst))
    return "; ".join(said)


def probe_cross_entropy(ops: ModuleType, device: torch.device) -> str:
    """Losses and gradients of a few rows of logits."""
    from fastattn.spec import CrossEntropyCall, SoftmaxSpec

    said = []
    for classes in (97, 50_257 if device.type == "cuda" else 3000):
        generator = torch.Generator(device).manual_seed(classes)
        logits = torch.randn(9, classes, generator=generator, device=device)
        target = torch.randint(classes, (9,), generator=generator, device=device)
        call = CrossEntropyCall(logits, target, -100, 0.1)
        losses, norms = ops.cross_entropy_fwd(SoftmaxSpec.of(logits), call)
        dlosses = torch.ones_like(losses)
        dlogits = ops.cross_entropy_bwd(SoftmaxSpec.of(logits, backward=True), call, dlosses, norms)
        results = []
        for dtype in (torch.float64, torch.float32):
            leaf = logits.to(dtype).requires_grad_()
            made = torch.nn.functional.cross_entropy(leaf, target, label_smoothing=0.1, reduction="none")
            results.append((made.detach(), torch.autograd.grad(made.sum(), leaf)[0]))
        worst = max(excess(a, p, g, torch.float32) for a, g, p in zip((losses, dlogits), *results))
        said.append(_within(f"{classes} classes", worst))
    return "; ".join(said)


@dataclass(frozen=True)
class Direction:
    """A group of launches that is probed together, and the parts of the backend disabled if it fails."""

    probe: Probe
    parts: tuple[str, ...]

    @property
    def switches(self) -> list[str]:
        """As FASTATTN_DISABLE names them."""
        return [f"cuda.{part}" for part in self.parts]


DIRECTIONS: dict[str, Direction] = {
    "forward": Direction(probe_forward, ("attention_fwd", "varlen_fwd")),
    "forward in clusters": Direction(probe_clusters, ("clusters",)),
    "softmax": Direction(probe_softmax, ("softmax_fwd", "softmax_bwd")),
    "cross-entropy": Direction(
        probe_cross_entropy,
        ("cross_entropy_fwd", "cross_entropy_bwd", "linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
    ),
    "backward two passes": Direction(partial(probe_backward, number=2), ("attention_bwd", "varlen_bwd")),
    "backward one pass": Direction(partial(probe_backward, number=1), ("one_pass",)),
}


def probe_here(name: str, device: torch.device) -> Finding:
    """One direction in this process: import first, then launch when a line arrives on standard input."""
    try:
        ops = kernel_runs.backend_for(device)
        Operands.draw(device, seqlen_q=8, head_dim=8)  # the device's context, and torch's own kernels
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(READY, flush=True)
        sys.stdin.readline()
        processes.announce(LAUNCH_SECONDS, name)
        return finding(CHECK, "passed", DIRECTIONS[name].probe(ops, device), backend="cuda", direction=name)
    except NotThis as reason:
        return finding(CHECK, "skipped", str(reason), backend="cuda", direction=name)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return finding(CHECK, "failed", text, backend="cuda", direction=name)


def probe_all(device: str, command: list[str] | None = None) -> list[Finding]:
    """One direction after another; each finding is printed at once."""
    command = command or [
        sys.executable,
        str(checkout.BENCHMARKS / "gpu_probes.py"),
        "--device",
        device,
        "--direction",
    ]
    events: processes.Events = SimpleQueue()
    running = {
        Process([*command, name], limit=300.0, silence=START_SECONDS, events=events): name
        for name in DIRECTIONS
    }
    order, ready = list(running), set[Process]()
    found: dict[str, Finding] = {}
    said: dict[Process, str] = {}
    current = 0  # the process that launches

    def next_turn() -> None:
        if current < len(order) and order[current] in ready:
            order[current].say("go")

    for process, event in processes.follow(*order):
        name = running[process]
        if isinstance(event, Ended):
            item = found.get(name) or _unreported(name, event, said.get(process, ""))
            found[name] = item
            print(json.dumps(item), flush=True)
            while current < len(order) and running[order[current]] in found:
                current += 1
            next_turn()
        elif event.text == READY:
            ready.add(process)
            process.silence = None  # it waits for the processes before it
            if current < len(order) and process is order[current]:
                next_turn()
        elif event.text.startswith('{"check"'):
            found[name] = json.loads(event.text)
        else:
            said[process] = event.text
    return [found[name] for name in DIRECTIONS]


def _unreported(name: str, event: Ended, last: str) -> Finding:
    why = event.why or f"its process ended with status {event.code}"
    return finding(CHECK, "failed", f"{why}{'; ' if last else ''}{last}", backend="cuda", direction=name)


def switches_for(findings: list[Finding]) -> str:
    """FASTATTN_DISABLE for what runs afterwards: the parts of every direction that did not pass.

    A direction that was not tried, for example because time was up, is switched off as well: it may hang.
    """
    tried = {item["direction"]: item["status"] for item in findings if item["check"] == CHECK}
    off = [name for name in DIRECTIONS if tried.get(name, "not run") not in ("passed", "skipped")]
    return ",".join(switch for name in off for switch in DIRECTIONS[name].switches)
