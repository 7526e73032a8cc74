"""Run alone or under torchrun by test_distributed.py: trains with 8 rows in a step on any number of processes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_lm import make_blocks, make_data

from fastattn.constants import IGNORE_INDEX
from fastattn.data.packing import IndexSampler
from fastattn.models import GPT, GPTConfig
from fastattn.train import TrainConfig, Trainer, TrainingDiverged
from fastattn.train.progress import NoDisplay
from fastattn.train.sharding import own_part

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
SHAPES = {1: (4, 2), 2: (2, 2), 4: (1, 2)}  # processes -> batch_size, accumulate
SETTINGS = {"max_steps": 8, "lr": 1e-2, "log_every": 2, "warmup_steps": 2, "device": "cpu"}
SETTINGS |= {"eval_every": 2, "ema_decay": 0.7, "grad_clip": 0.3, "weight_decay": 0.05}
SIZES = {"vocab_size": 23, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2, "positions": "rotary"}


class Ragged:
    """Rows with 0 to 8 labels, an odd number of them."""

    def __init__(self, seed, rows=75):
        self.blocks = make_data(seed=seed)
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        item = self.blocks[index]
        if index % 3 == 0:
            item["labels"][:] = IGNORE_INDEX
        else:
            item["labels"][1 + (5 * index) % 9 :] = IGNORE_INDEX
        return item


def make_gpt(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SIZES, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0))


def train(out, *, make=make_blocks, seed=0, dropout=0.0, on_step=None, keywords=None, **options):
    """The run's result, all weights on the first process, and the trainer."""
    batch_size, accumulate = SHAPES[WORLD]
    settings = {
        **SETTINGS,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "output_dir": str(out),
    } | options
    # other weights on other processes, which begin with those of the first
    model = make(seed=seed + dist.get_rank() if dist.is_initialized() else seed, dropout=dropout).double()
    trainer = Trainer(
        model, TrainConfig(**settings), Ragged(0), Ragged(1, 37), display=NoDisplay(), **(keywords or {})
    )
    if on_step is not None:
        after = trainer._after_step

        def hooked():
            after()
            on_step(trainer)

        trainer._after_step = hooked
    result = trainer.fit()
    return result, dict(trainer.whole_model().state_dict()), trainer


def signal_last(trainer):
    """Only one process is told to stop; all must."""
    if trainer.distributed.rank == WORLD - 1 and trainer.state.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def same(one, other):
    """Whether all bits are the same, of whole weights on the first process and of its own parts on each other one."""
    return one.keys() == other.keys() and all(
        torch.equal(own_part(one[name]), own_part(other[name])) for name in one
    )


def figures(model):
    """Uses parts of the model by themselves, as a task's decoding does."""
    hidden = model.blocks[1](model.blocks[0](model.embed.weight))
    return {
        "hidden": float(hidden.square().mean()),
        "head": float(model.head(model.norm(model.embed.weight)).mean()),
    }


def whole_run(folder, sharding):
    """A run with figures, averages and clipping, compared with that of one process."""
    shown = {"evaluate_with": figures, "show_with": lambda model: f"{model.embed.weight.sum():.6f}"}
    result, weights, trainer = train(folder / "plain", sharding=sharding, keywords=shown)
    if trainer.distributed.is_main:
        torch.save(weights, folder / "weights.pt")
    records = trainer.log.records
    return {
        "last": result.last.loss,
        "figures": result.last.figures,
        "targets": result.last.targets,
        "tokens": result.tokens,
        "losses": [r["loss"] for r in records if r["event"] == "train"],
        "norms": [r["grad_norm"] for r in records if r["event"] == "train"],
        "samples": [float(r["text"]) for r in records if r["event"] == "sample"],
        "files": sorted(p.name for p in result.checkpoint.iterdir()),
    }


def early_stop(folder, sharding):
    """Evaluations get worse; all processes must stop at the same step."""
    keywords = {"evaluate_with": lambda model: {"rising": float(next(counter))}, "best": ("rising", False)}
    counter = iter(range(99))
    result, _, _ = train(folder / "early", sharding=sharding, patience=2, keywords=keywords)
    return result.steps


def resumed_with_the_same_bits(folder, sharding, **options):
    straight, wanted, _ = train(folder / "straight", sharding=sharding, dropout=0.3, **options)
    stopped, _, _ = train(folder / "parts", sharding=sharding, dropout=0.3, on_step=signal_last, **options)
    resumed, found, _ = train(
        folder / "parts", sharding=sharding, dropout=0.3, seed=7, resume="auto", **options
    )
    equal = same(wanted, found) and straight.last == resumed.last
    apart = max(
        float((own_part(wanted[n]) - own_part(found[n])).abs().max())
        for n in wanted
        if own_part(wanted[n]).numel()
    )
    return {"steps": [stopped.steps, stopped.interrupted, resumed.steps], "equal": equal, "apart": apart}


def saved_by_time(folder, sharding):
    """Checkpoints by the first process's clock, though others' run faster; they leave the weights as they are."""
    options = {"sharding": sharding, "dropout": 0.3, "keep_checkpoints": 9}
    _, found, often = train(folder / "often", save_seconds=1e-9, **options)
    monotonic = time.monotonic
    if dist.is_initialized() and dist.get_rank():
        time.monotonic = lambda: 1e4 * monotonic()
    try:
        _, wanted, once = train(folder / "once", save_seconds=1e3, **options)
    finally:
        time.monotonic = monotonic
    apart = max(
        float((own_part(wanted[n]) - own_part(found[n])).abs().max())
        for n in wanted
        if own_part(wanted[n]).numel()
    )
    steps = [sorted(p.name for p in trainer.directory.checkpoints()) for trainer in (often, once)]
    return {"often": steps[0], "once": steps[1], "apart": apart}


def diverged(folder, sharding):
    """The loss of the last process is not finite: all raise the same error, with that one's examples."""

    def poison(trainer):
        if trainer.state.step == 3 and trainer.distributed.rank == WORLD - 1:
            loss = trainer.objective.loss
            trainer.objective.loss = lambda *arguments: loss(*arguments) * float("nan")

    batch_size, accumulate = SHAPES[WORLD]
    sampler = IndexSampler(75, 0, rank=WORLD - 1, world_size=WORLD)
    batches = [sampler.next_batch(batch_size) for _ in range(4 * accumulate)]
    try:
        train(folder / "diverged", sharding=sharding, on_step=poison)
    except TrainingDiverged as error:
        if dist.is_initialized() and dist.get_rank():
            return {}  # the first process may not have written its record yet
        records = (folder / "diverged" / "log.jsonl").read_text().splitlines()
        (record,) = [r for r in map(json.loads, records) if r["event"] == "diverged"]
        labelled = [batch for batch in batches[-accumulate:] if any(index % 3 for index in batch)]
        return {
            "right": record["examples"] == [index for batch in labelled for index in batch],
            "processes": record.get("processes"),
            "named": record["parameter"],
            "text": str(error),
        }
    return {}


def gpt(folder, sharding):
    """A model that is saved by its own method: the folder at the end loads without any process group."""
    # A larger eps: the gradient of key biases is zero but for rounding, and a small one would make steps of it.
    options = {"activation_checkpointing": True, "eps": 1e-4}
    _, weights, trainer = train(folder / "gpt", make=make_gpt, sharding=sharding, **options)
    if trainer.distributed.is_main:
        torch.save(weights, folder / "gpt.pt")


def other_sizes(folder, source):
    """From the checkpoint of another number of processes at step 4, four steps more."""
    for size in (1, 2, 4):
        start = source / str(size) / "start" / "checkpoint-4"
        if start.is_dir():
            _, weights, trainer = train(folder / f"from{size}", sharding="fsdp", seed=3, resume=str(start))
            if trainer.distributed.is_main:
                torch.save(weights, folder / f"from{size}.pt")


def damaged(folder):
    """The newest checkpoint has one other bit; the one before it is used, on all processes."""
    train(folder / "damaged", sharding="fsdp", max_steps=4, save_every=2)
    if not dist.is_initialized() or dist.get_rank() == 0:
        part = max((folder / "damaged" / "checkpoint-4" / "shards").glob("*.distcp"))
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    result, _, trainer = train(folder / "damaged", sharding="fsdp", seed=5, resume="auto")
    warned = [r["text"] for r in trainer.log.records if r["event"] == "warning"]
    return [trainer.directory.resume_from.name, result.steps, any("CRC-32" in text for text in warned)]


def failed_write(folder):
    """A process that cannot write ends the run everywhere; the checkpoint before stays the newest."""
    from torch.distributed.checkpoint import FileSystemWriter

    real = FileSystemWriter.write_data

    def full_disk(self, *args, **kwargs):
        if "checkpoint-4" in str(self.path) and (not dist.is_initialized() or dist.get_rank() == WORLD - 1):
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    FileSystemWriter.write_data = full_disk
    try:
        train(folder / "full", sharding="fsdp", save_every=2)
    except OSError as error:
        return [str(error), sorted(p.name for p in (folder / "full").iterdir() if p.is_dir())]
    finally:
        FileSystemWriter.write_data = real
    return ["nothing was raised"]


def main(folder, sizes):
    report = {}
    for sharding in ("ddp", "fsdp"):
        place = folder / sharding
        place.mkdir(exist_ok=True)
        report[sharding] = whole_run(place, sharding)
        report[sharding]["early"] = early_stop(place, sharding)
        report[sharding]["resumed"] = resumed_with_the_same_bits(place, sharding, loader_workers=WORLD % 4)
        report[sharding]["timed"] = saved_by_time(place, sharding)
        report[sharding]["diverged"] = diverged(place, sharding)
        gpt(place, sharding)
    train(folder / "start", sharding="fsdp", max_steps=4, schedule="constant")
    report["damaged"] = damaged(folder)
    report["full"] = failed_write(folder)
    other_sizes(folder, sizes)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
