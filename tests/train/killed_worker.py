"""Run by test_killed.py: `fastattn train masked-lm` killed at random moments, and started again with --resume auto.

Processes are forked from this one, which has imported everything, so that moments within the run are hit.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from training_cases import rows, save_encoder, write

from fastattn import cli
from fastattn.models import families

FILES = ("model.safetensors", "config.json", "tokenizer.json")
MEASURED = {"seconds", "tokens_per_second", "peak_memory", "stopped", "wall_seconds", "out"}


def start(words):
    """A child that runs the command; its process id."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    try:
        cli.app(words)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)
    os._exit(0)


def left(out):
    """The figures, log and files of a run that has ended, without times."""
    report = json.loads((out / "report.json").read_text())
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in record.items() if k not in MEASURED} for record in records]
    return (
        {k: v for k, v in report.items() if k not in MEASURED},
        plain,
        [(out / name).read_bytes() for name in FILES if (out / name).exists()],
    )


def main(folder, kills, seed):
    torch.set_num_threads(1)
    encoder = save_encoder(folder / "encoder")
    data = write(folder / "train.jsonl", rows("masked-lm"))

    def words(name):
        options = [
            "--train.max_steps=12",
            "--train.batch_size=4",
            "--train.accumulate=2",
            "--train.device=cpu",
        ]
        options += ["--train.save_every=2", "--train.eval_every=3", "--train.ema_decay=0.9"]
        options += ["--train.loader_workers=1", "--train.log_every=1", "--resume", "auto"]
        return ["train", "masked-lm", "--train", str(data), "--dev", str(data), "--model", str(encoder), "--out",
                str(folder / name), *options]  # fmt: skip

    begun = time.monotonic()
    assert os.waitpid(start(words("straight")), 0)[1] == 0
    whole = time.monotonic() - begun
    random.seed(seed)
    moments, steps, ended = [], [], 0
    while len(moments) < kills:
        child = start(words("killed"))
        moment = random.uniform(0.0, 0.7 * whole)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            moments.append(round(moment, 3))
        else:  # it came to its end first: another one from the start
            ended += 1
            assert status == 0, f"after kills at {moments}: {status}"
            assert left(folder / "killed") == left(folder / "straight"), f"after kills at {moments}"
            (folder / "killed").rename(folder / f"ended{ended}")
        out = folder / "killed"
        steps.append(
            max((int(p.name[11:]) for p in out.glob("checkpoint-*")), default=0) if out.is_dir() else 0
        )
    assert os.waitpid(start(words("killed")), 0)[1] == 0
    equal = left(folder / "killed") == left(folder / "straight")
    families.load(folder / "killed")
    print(json.dumps({"equal": equal, "seconds": moments, "newest_checkpoint": steps, "ended_before": ended}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
