"""Every task on two gloo processes is that on one, and a run whose processes are all killed goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_cases import rows, save_encoder, write

from fastattn.data import train_bpe
from fastattn.models import GPT, GPTConfig, families

WORKER = Path(__file__).with_name("tasks_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CHATS = [{"prompt": f"Say {word}", "completion": word} for word in ("one", "two", "six", "ten")]
PAIRS = [{"prompt": f"Say {w}", "chosen": w, "rejected": f"{w} {w}"} for w in ("one", "two", "six", "ten")]
TEXTS = ["Anna has a cat.", "Ben has a dog.", "Anna sees a dog.", "Ben sees a cat."]
STEPS = ("--train.max_steps=3", "--train.device=cpu", "--train.lr=1e-3", "--train.eval_every=3")
FLOAT32 = 1e-4  # relative: sums in another order, over three steps


def decoder(folder: Path) -> Path:
    """A small GPT with its tokenizer."""
    texts = [*TEXTS, *(f"User: {c['prompt']}\nAssistant: {c['completion']}" for c in CHATS)]
    tokenizer = train_bpe(texts, vocab_size=280)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT(GPTConfig(**sizes, eos_token_id=tokenizer.eos_id)).save_pretrained(folder, tokenizer=tokenizer)
    return folder


def commands(folder: Path) -> dict[str, list[str]]:
    """A run of each task, and of some with parameters split over the processes."""
    encoder, gpt = save_encoder(folder / "encoder"), decoder(folder / "gpt")
    files = {task: write(folder / f"{task}.jsonl", rows(task)) for task in ("classify", "qa", "embed")}
    files["masked-lm"] = write(folder / "masked-lm.jsonl", rows("masked-lm"))
    files["tag"] = write(folder / "tag.conll", rows("tag"))
    files["causal-lm"] = write(folder / "text.jsonl", [{"text": text} for text in TEXTS * 4])
    files["chat"] = write(folder / "chat.jsonl", CHATS * 4)
    files["dpo"] = write(folder / "dpo.jsonl", PAIRS * 4)
    files["seq2seq"] = write(folder / "seq2seq.jsonl", [{"source": r["text"], "target": r["text"][:9]}
                                                        for r in rows("masked-lm")])  # fmt: skip
    options = {
        "seq2seq": ["--task.num_beams=1", "--task.max_target_length=12"],
        "causal-lm": ["--task.max_length=16"],
    }
    made = {}
    for sharding, tasks in (("ddp", files), ("fsdp", ("causal-lm", "classify", "seq2seq"))):
        for task in tasks:
            model = gpt if task in ("causal-lm", "chat", "dpo") else encoder
            words = ["train", task, "--train", files[task], "--dev", files[task], "--model", model, *STEPS]
            words += [f"--train.sharding={sharding}", *options.get(task, [])]
            made[f"{task}-{sharding}"] = [str(word) for word in words]
    return made


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


def run_processes(folder: Path, world: int) -> None:
    """Run the commands in `folder` with `world` processes; an error shows what each of them wrote.

    When one fails, its peers fail too, by a lost connection: any of the texts may be the one with the cause.
    """
    port = free_port()
    ranks, errors = [], [folder / f"stderr-{world}-{rank}.txt" for rank in range(world)]
    for rank, path in enumerate(errors):
        several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, str(WORKER), str(folder), str(world)]
        with path.open("w") as stderr:
            ranks.append(subprocess.Popen(command, env=env | (several if world > 1 else {}), stderr=stderr))
    until = time.monotonic() + 280
    try:
        for process in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed, and its exit status says so
                process.wait(timeout=max(0.0, until - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
        codes = [process.wait() for process in ranks]
    shown = [f"process {rank}, exit {code}:\n{path.read_text()[-3000:]}" for rank, (code, path) in
             enumerate(zip(codes, errors, strict=True))]  # fmt: skip
    assert not any(codes), "\n".join(shown)


@pytest.mark.exhaustive
def test_every_task_on_two_processes_is_that_on_one(tmp_path: Path) -> None:
    """On the same global batch. Masks are drawn by each process, and embeddings have the negatives of its own batch, so
    of those only the shape of the run is compared."""
    made = commands(tmp_path)
    (tmp_path / "commands.json").write_text(json.dumps(made))
    for world in (1, 2):
        run_processes(tmp_path, world)
    one, two = (json.loads((tmp_path / f"reports-{world}.json").read_text()) for world in (1, 2))
    assert one.keys() == two.keys() == made.keys()
    for name, expected in one.items():
        found = two[name]
        assert found["steps"] == expected["steps"] == 3, name
        assert found["metrics"].keys() == expected["metrics"].keys(), name
        families.load(tmp_path / f"{name}-2")
        if name.startswith(("masked-lm", "embed")):
            continue
        if not name.startswith("dpo"):  # whose rows are packed by batch, and padding counts
            assert found["tokens"] == expected["tokens"], name
        assert found["last"]["loss"] == pytest.approx(expected["last"]["loss"], rel=FLOAT32), name
        for figure, value in expected["metrics"].items():
            assert found["metrics"][figure] == pytest.approx(value, rel=FLOAT32, abs=FLOAT32), (name, figure)


def steps_of(out: Path) -> int:
    """The newest complete checkpoint's step."""
    return max((int(path.name[11:]) for path in out.glob("checkpoint-*")), default=0)


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = [process]
    for each in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == each]
    return found


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by Linux's /proc")
def test_a_run_whose_processes_are_all_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL to torchrun and its processes at once; the same command then ends as a run that was never stopped."""
    data = write(tmp_path / "train.conll", rows("tag"))
    words: list[Any] = [
        "train",
        "tag",
        "--train",
        data,
        "--dev",
        data,
        "--model",
        save_encoder(tmp_path / "encoder"),
    ]
    words += [*STEPS[1:], "--train.max_steps=400", "--train.batch_size=2", "--train.save_every=2", "--json"]
    words += [
        "--train.eval_every=100",
        "--train.sharding=fsdp",
        "--resume",
        "auto",
        "--out",
        tmp_path / "killed",
    ]
    command = [*TORCHRUN, "-m", "fastattn", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while steps_of(tmp_path / "killed") < 4 and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert started.poll() is None, "it ended before it could be killed"
    finally:
        found = family(started.pid)
        for process in found:
            os.kill(process, signal.SIGKILL)
        started.wait()
    assert len(found) == 3  # torchrun and its two workers, which are in sessions of their own
    reached = steps_of(tmp_path / "killed")
    assert 4 <= reached < 400
    total = reached + 6
    command = [word.replace("max_steps=400", f"max_steps={total}") for word in command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert (report["steps"], report["interrupted"]) == (total, False)
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in log if record["event"] == "train"]
    assert steps == sorted(set(steps))  # what came after the checkpoint is not there twice
    families.load(tmp_path / "killed")
