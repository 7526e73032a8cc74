"""Run under torchrun by test_distributed.py: trains with a global batch of 8 rows on any number of processes."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_lm import make_data, make_model

from fastattn.constants import IGNORE_INDEX
from fastattn.train import TrainConfig, Trainer
from fastattn.train.progress import NoDisplay

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Ragged:
    """Rows with 0 to 8 labels."""

    def __init__(self, seed):
        self.blocks = make_data(seed=seed)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        item = self.blocks[index]
        if index % 3 == 0:
            item["labels"][:] = IGNORE_INDEX
        else:
            item["labels"][1 + (5 * index) % 9 :] = IGNORE_INDEX
        return item


def train(out, *, dropout, on_step=None, **options):
    """Weights after the run, its result, and the trainer."""
    settings = {"max_steps": 8, "batch_size": 4 // WORLD, "accumulate": 2, "lr": 1e-2, "log_every": 2}
    settings |= {"warmup_steps": 2, "device": "cpu", "output_dir": str(out), **options}
    model = make_model(dropout=dropout).double()
    trainer = Trainer(model, TrainConfig(**settings), Ragged(0), Ragged(1), display=NoDisplay())
    if on_step is not None:
        after = trainer._after_step

        def hooked():
            after()
            on_step(trainer)

        trainer._after_step = hooked
    return trainer.fit(), {name: value.clone() for name, value in model.state_dict().items()}, trainer


def signal_rank_1(trainer):
    """Only one process is told to stop; all must."""
    if trainer.distributed.rank == 1 and trainer.state.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def main(folder):
    result, weights, trainer = train(folder / "plain", dropout=0.0)
    report = {"last": result.last.loss, "targets": result.last.targets, "tokens": result.tokens}
    report["losses"] = [r["loss"] for r in trainer.log.records if r["event"] == "train"]
    if trainer.distributed.is_main:
        torch.save(weights, folder / "weights.pt")
    if WORLD > 1:
        _, straight, _ = train(folder / "straight", dropout=0.3)
        stopped, _, _ = train(folder / "parts", dropout=0.3, on_step=signal_rank_1)
        resumed, again, trainer = train(folder / "parts", dropout=0.3, resume="auto")
        report["stopped"] = [stopped.steps, stopped.interrupted, resumed.steps]
        report["same_bits"] = all(torch.equal(straight[name], again[name]) for name in straight)
        gathered = [None] * WORLD
        dist.all_gather_object(gathered, again)
        report["ranks_agree"] = all(
            torch.equal(gathered[0][name], other[name]) for other in gathered for name in other
        )
    if trainer.distributed.is_main:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
