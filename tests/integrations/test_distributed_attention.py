"""Attention of DTensors, and of a sequence split over processes; two and four gloo processes agree with one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastattn
from fastattn.integrations import context_parallel

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one(tmp_path: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"collectives": 0, "processes": processes}


@pytest.fixture
def alone(tmp_path: Path):
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("length", "processes"), [(0, 3), (1, 2), (37, 4), (64, 8)])
def test_a_split_has_every_row_once_and_even_causal_work(length: int, processes: int) -> None:
    parts = context_parallel.split(length, processes)
    assert sorted(row for rows in parts for part in rows for row in part) == list(range(length))
    work = [sum(row + 1 for part in rows for row in part) for rows in parts]
    assert max(work) - min(work) <= 2 * (length + 1)


def test_one_process_has_the_whole_sequence(alone: None) -> None:
    whole = [torch.randn(1, 2, 11, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ids = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2])
    expected = fastattn.attention(*whole, causal=True, segment_ids=ids)
    found = context_parallel.attention(*whole, context_parallel.split(11, 1), segment_ids=ids)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(out.square().sum(), whole) for out in (found, expected))
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other)


def test_what_does_not_fit_is_refused(alone: None) -> None:
    query = torch.randn(1, 2, 6, 8)
    good = context_parallel.split(6, 1)
    for parts, complaint in (
        (context_parallel.split(6, 2), "parts: got 2, needs one for each of 1 processes"),
        ([(range(3), range(4, 6))], "parts: needs every row of the sequence once"),
        ([(range(4), range(3, 6))], "parts: needs every row of the sequence once"),
        (context_parallel.split(7, 1), r"query: got shape \(1, 2, 6, 8\), needs \(B, heads, 7, D\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            context_parallel.attention(query, query, query, parts)
    with pytest.raises(ValueError, match="segment_ids: got shape"):
        context_parallel.attention(query, query, query, good, segment_ids=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="alibi_slopes: needs causal=True"):
        context_parallel.attention(query, query, query, good, causal=False, alibi_slopes=torch.ones(2))
    with pytest.raises(ValueError, match="length: got -1"):
        context_parallel.split(-1, 1)
    with pytest.raises(ValueError, match="processes: got 0"):
        context_parallel.split(1, 0)


def test_it_needs_a_process_group() -> None:
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        context_parallel.attention(query, query, query, context_parallel.split(6, 1))


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example alone, in the environment that torchrun makes for one process."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    for example, shape in zip(examples, ((4, 8, 64, 32), (1, 8, 1001, 32))):
        names: dict[str, object] = {}
        exec(example, names)
        assert isinstance(names["out"], torch.Tensor)
        assert names["out"].shape == shape
        assert not dist.is_initialized()
