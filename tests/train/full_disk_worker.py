"""Run by test_full_disk.py: a short run in which each write fails once, and goes on where there is space."""

import ctypes
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_lm import make_data

from fastattn.data import train_bpe
from fastattn.models import GPT, GPTConfig
from fastattn.train import TrainConfig, Trainer
from fastattn.train.progress import NoDisplay

LIMIT = 10_000  # writes of the run, far more than there are
KEEP = {"seconds", "tokens_per_second", "stopped", "peak_memory"}


def run(out, tokenizer, sharding, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = TrainConfig(
        output_dir=str(out), max_steps=2, batch_size=4, warmup_steps=0, device="cpu", save_every=1, eval_every=1,
        eval_batches=1, ema_decay=0.5, log_every=1, keep_checkpoints=1, sharding=sharding, **options,
    )  # fmt: skip
    trainer = Trainer(
        GPT(GPTConfig(**sizes)),
        config,
        make_data(),
        make_data(seed=1),
        tokenizer=tokenizer,
        display=NoDisplay(),
    )
    return trainer.fit()


def contents(out, result):
    """Everything that the run leaves, without times."""
    found = {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    log = [{k: v for k, v in record.items() if k not in KEEP} for record in result.log]
    for name in list(found):
        if name.endswith(("log.jsonl", "trainer_state.json", ".metadata", "train_config.yaml")):
            del found[name]  # with times, or the option `resume`
    return found, log


def main(folder, library, sharding, step):
    disk = ctypes.CDLL(library)  # the preloaded one
    disk.full_disk_count.restype = ctypes.c_long
    disk.full_disk_failed.restype = ctypes.c_char_p
    limits = ctypes.c_long, ctypes.c_long
    disk.full_disk.argtypes = (ctypes.c_char_p, *limits)
    tokenizer = train_bpe(["a few words to learn"], vocab_size=260)
    out = folder / "out"

    def arm(first, last):
        disk.full_disk(str(out).encode(), first, last)

    arm(0, 0)
    wanted = contents(out, run(out, tokenizer, sharding))
    writes = disk.full_disk_count()
    problems = []
    for first in range(1, writes + 1, step):
        for last in (first, LIMIT):  # one write fails, or all from there on
            shutil.rmtree(out)
            arm(first, last)
            which = f"{first}..{last}"
            try:
                result = run(out, tokenizer, sharding)
            except OSError as error:
                if error.errno not in (5, 28) or not str(error.filename).startswith(str(out)):
                    problems.append(f"{which}: {error!r} names {error.filename}")
            except Exception as error:
                problems.append(f"{which}: {error!r}")
            else:  # there was another way
                if contents(out, result) != wanted:
                    problems.append(f"{which}: no error, but other files or records")
            if problems and problems[-1].startswith(which):
                problems[-1] += f" ({disk.full_disk_failed().decode()})"
            arm(0, 0)
            try:
                result = run(out, tokenizer, sharding, resume="auto")
            except Exception as error:
                problems.append(f"{which}: after it {error!r}")
                continue
            if contents(out, result) != wanted:
                problems.append(f"{which}: other files or records")
    print(json.dumps({"writes": writes, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
