"""Runs a row of docs/results.md: its commands one after another within a time, what each finds stored at once."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import checkout
from report import schema
from report.schema import Result
from trained import files as row_files
from trained.rows import QUICK_DECODER, QUICK_ENCODER, QUICK_TRAIN, Step, TaskRow

STORED = "row.json"  # in the row's folder, which the next run of the row replaces
GRACE = 180.0  # seconds beyond the limit for the figures of a model whose training was cut
ENDING = 120.0  # seconds that a run has to write its checkpoint
CURVE = 80  # most points of a stored curve
SCRIPTS = {"peer": "benchmarks/trained/trainer.py", "stops": "benchmarks/trained/stops.py"}
SHOWN = {"data": "DATA", "encoder": "ENCODER", "files": "RUN/files", "out": "RUN"}
PLACE = re.compile(r"\{(data|encoder|files|out|seconds|precision)(?::([\d.]+))?\}")


def fastest_precision() -> str:
    """bfloat16 where this machine multiplies in it, else float32: as `fastattn train` calls them."""
    from fastattn import torch_compat

    fast = torch.cuda.is_available() or torch_compat.has_fast_products(torch.bfloat16)
    return "bfloat16" if fast else "float32"


@dataclass
class Run:
    """One run of a row, and its record so far."""

    row: TaskRow
    data: Path
    encoder: Path
    out: Path  # of the row
    seconds: float  # that it may take, and of which steps take shares
    quick: bool = False
    stored: tuple[Path, ...] = ()  # where the record goes
    conditions: str = ""  # what else the machine did, for the page
    record: Result = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    extra: float | None = None  # seconds that the rest of an earlier run may take; None for a new run
    before: float = 0.0  # seconds that the earlier run took

    def left(self) -> float:
        """Seconds of the limit that are left."""
        limit = self.seconds if self.extra is None else self.extra
        return limit - (time.monotonic() - self.started)

    def filled(self, words: Sequence[str]) -> list[str]:
        """The words of a command with this run's folders and seconds."""
        places = {"data": self.data, "encoder": self.encoder, "files": self.out / "files", "out": self.out}
        return [self._with(word, {name: str(path) for name, path in places.items()}) for word in words]

    def shown(self, words: Sequence[str]) -> str:
        """The same as the page shows it, without this machine's folders."""
        return " ".join(_quoted(self._with(word, SHOWN)) for word in words)

    def _with(self, word: str, places: dict[str, str]) -> str:
        def value(found: re.Match[str]) -> str:
            if found[1] == "seconds":
                return f"{self.seconds * float(found[2] or 1):.0f}"
            if found[1] == "precision":
                return fastest_precision()
            return places[found[1]]

        return PLACE.sub(value, word)

    def store(self) -> None:
        """Write the record as it is now."""
        self.record["seconds"] = round(self.before + time.monotonic() - self.started, 1)
        for path in self.stored:
            schema.replace_file(path, json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")


def run(job: Run) -> Result:
    """Run every step of the row; the record, which is also where `job.stored` says after each step.

    Its "status" is "complete" where every step ended by itself, else "cut". Ctrl-C and SIGTERM end step and row.
    """
    row = job.row
    files = job.out / "files"
    steps = quick_steps(row.steps) if job.quick else row.steps
    if job.extra is None:
        _clear(job.out)
        files.mkdir(parents=True)
        job.record = new_record(job, steps)
        job.store()
        row.prepare(job.data, files)
    else:
        _continue(job, steps)
    done: list[Result] = job.record["steps"]
    try:
        with _interrupts():
            for step in steps[len(done) :]:
                done.append({"name": step.name, "kind": step.kind, "status": "running", "seed": step.seed})
                done[-1] |= {"command": command_line(job, step), "figures": step.figures}
                job.store()
                done[-1] |= _run_step(job, step, done)
                job.store()
                print(
                    f"{step.name}: {step.kind} {done[-1]['status']}, {done[-1].get('seconds', 0):.0f} s",
                    flush=True,
                )
    except KeyboardInterrupt:
        done[-1] |= {"status": "cut", "reason": "interrupted"} if done[-1]["status"] == "running" else {}
    whole = len(done) == len(steps) and all(each["status"] == "done" for each in done)
    job.record["status"] = "complete" if whole else "cut"
    job.store()
    return job.record


def new_record(job: Run, steps: Sequence[Step]) -> Result:
    """The record of a run of which nothing is done: what ran it, where, and how."""
    about = schema.new_result("tasks", torch.device("cuda" if torch.cuda.is_available() else "cpu"), {})
    versions = {**about["versions"], **_versions("transformers", "tokenizers", "scikit-learn", "sacrebleu")}
    limit = f"{job.seconds / 60:g}"
    command = (
        f"python benchmarks/tasks.py {job.row.name} --data DATA --encoder ENCODER --out OUT --minutes {limit}"
    )
    return {
        "row": job.row.name,
        "status": "cut",
        "quick": job.quick,
        "date": about["date"],
        "device": about["device"],
        "versions": versions,
        "revision": about["revision"],
        "dirty": about["dirty"],
        "conditions": job.conditions,
        "command": command,
        "minutes": job.seconds / 60,
        "planned": len(steps),
        "seconds": 0.0,
        "steps": [],
    }


def _continue(job: Run, steps: Sequence[Step]) -> None:
    """Take over the record of an earlier run up to its first step that did not end by itself.

    Raises:
        ValueError: there is no such run, its commands were others, or it was complete.
    """
    path = job.out / STORED
    if not path.is_file():
        raise ValueError(f"--resume: {job.out} holds no earlier run of the row")
    record: Result = json.loads(path.read_text(encoding="utf-8"))
    if record["status"] == "complete":
        raise ValueError(f"--resume: the run in {job.out} is complete")
    job.seconds, job.before = 60 * record["minutes"], record["seconds"]
    kept = list(itertools.takewhile(lambda step: step["status"] == "done", record["steps"]))
    for step, planned in zip(kept, steps):
        if (command := command_line(job, planned)) != step["command"]:
            raise ValueError(
                f"--resume: the earlier run had the command {step['command']!r}, now it is {command!r}"
            )
    for words in (job.filled(step.words) for step in steps[len(kept) :] if step.kind in ("train", "peer")):
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    now = new_record(job, steps)
    about = {name: now[name] for name in ("date", "device", "revision", "dirty", "conditions")}
    rest = {**about, "minutes": (job.extra or 0.0) / 60, "after": len(kept)}
    job.record = {**record, "steps": kept, "continued": [*record.get("continued", []), rest]}
    job.store()


def quick_steps(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of the first seed, on models of a few thousand weights that train for two steps."""
    smaller = {None: (), "encoder": QUICK_ENCODER, "decoder": (*QUICK_DECODER, "--data.vocab_size=300")}
    chosen = []
    for step in steps:
        if step.seed not in (None, 0) or any(f"seed {seed}" in step.name for seed in range(1, 10)):
            continue
        words = step.words
        if step.kind == "train":
            vocabulary = "--data.vocab_size=300" if step.preset == "decoder" else ""
            kept = [w for w in words if not (vocabulary and w.startswith("--data.vocab_size="))]
            words = (*kept, *smaller[step.preset], *QUICK_TRAIN)
        chosen.append(replace(step, words=tuple(words)))
    return tuple(chosen)


def command_line(job: Run, step: Step) -> str:
    """A step's command as the page shows it."""
    if step.kind in SCRIPTS:
        return job.shown(("python", SCRIPTS[step.kind], *step.words))
    return job.shown(("fastattn", *step.words))


def _run_step(job: Run, step: Step, done: Sequence[Result]) -> Result:
    """Run one step in a process; its status and what it found."""
    needed = [each for each in done[:-1] if each["name"] == step.name and each["kind"] in ("train", "peer")]
    if needed and needed[-1]["status"] not in ("done", "cut"):
        return {"status": "skipped", "reason": "its model was not trained"}
    words = job.filled(step.words)
    if needed and step.kind in ("evaluate", "stops"):
        folder = Path(words[1] if step.kind == "evaluate" else words[0])
        if not (folder / "config.json").is_file():
            return {"status": "skipped", "reason": "its training was cut before it saved a model"}
    grace = GRACE if needed and step.kind not in ("train", "peer") else 0.0
    limit = job.left() + grace
    if limit < 1.0:
        return {"status": "skipped", "reason": "no time was left"}
    if step.kind == "evaluate":
        words, lacking = _without_missing(words)
    else:
        lacking = ""
    if step.kind == "peer":
        words += ["--seconds", f"{max(1.0, limit - ENDING / 4):.0f}"]
        limit += ENDING
    script = [str(checkout.ROOT / SCRIPTS[step.kind])] if step.kind in SCRIPTS else ["-m", "fastattn"]
    log = job.out / f"{len(done):02d}-{step.kind}.txt"
    began = time.monotonic()
    code, output, stopped = _call([sys.executable, *script, *words], limit, log)
    found: Result = {"seconds": round(time.monotonic() - began, 2)}
    if lacking:
        found["note"] = lacking
    if step.kind == "train":
        found |= _of_training(Path(words[words.index("--out") + 1]))
    elif code == 0:
        found |= _of_output(step, output)
    if stopped or found.pop("cut", False):
        return {**found, "status": "cut", "reason": "its time was over"}
    if code != 0:
        return {**found, "status": "failed", "reason": _last_line(log)}
    return {**found, "status": "done"}


def _call(command: Sequence[str], limit: float, log: Path) -> tuple[int, str, bool]:
    """(exit status, standard output, whether it was stopped) of a command that may take `limit` seconds."""
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=checkout.ROOT
        )
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output, False
        except subprocess.TimeoutExpired:
            output = _end(process)
            return process.returncode, output, True
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[str]) -> str:
    """Stop a process, which may write its checkpoint first; what it had printed."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=ENDING)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate(timeout=ENDING)[0]


def _of_training(out: Path) -> Result:
    """What a run of `fastattn train` left: the figures of its report, or of its log where it was cut."""
    from fastattn.train.log import read_log

    found: Result = {}
    log = read_log(out / "log.jsonl") if (out / "log.jsonl").is_file() else []
    found["curve"] = thinned([r for r in log if r["event"] == "eval"])
    trained = [r for r in log if r["event"] == "train"]
    if trained:
        found |= {
            "steps": trained[-1]["step"],
            "tokens": trained[-1]["tokens"],
            "train_seconds": trained[-1]["seconds"],
        }
    path = out / "report.json"
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: report[name] for name in ("steps", "tokens", "flops", "peak_memory", "parameters")}
        found |= {
            "train_seconds": report["seconds"],
            "stopped": report["stopped"],
            "dev": _numbers(report["metrics"]),
        }
        found["best"] = _numbers(report["best"])
    return found


def _of_output(step: Step, output: str) -> Result:
    """The figures that a command printed as JSON."""
    text = output.strip().splitlines()[-1] if step.kind in SCRIPTS else output  # peers print more before
    printed = json.loads(text)
    if step.kind == "peer":
        return {**{k: v for k, v in printed.items() if k != "seconds"}, "train_seconds": printed["seconds"]}
    if step.kind == "stops":
        return {"metrics": printed}
    return {
        "count": printed["count"],
        "metrics": _numbers(printed["metrics"]),
        "baselines": {name: _numbers(each) for name, each in printed["baselines"].items()},
        "signatures": printed["signatures"],
    }


def thinned(records: Sequence[Result], most: int = CURVE) -> list[Result]:
    """Evaluations as points (step, seconds, loss and other numbers), of many every n-th and the last."""
    from fastattn.integers import cdiv

    step = max(1, cdiv(len(records), most))
    kept = [*records[:-1:step], *records[-1:]]
    return [_numbers({k: v for k, v in record.items() if k != "perplexity"}) for record in kept]


def _numbers(values: Any) -> Result:
    return {
        k: v for k, v in (values or {}).items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }


def _without_missing(words: Sequence[str]) -> tuple[list[str], str]:
    """The words without `--baseline tfidf` where scikit-learn is not installed, and what to say about it."""
    words = list(words)
    if "tfidf" not in words or importlib.util.find_spec("sklearn") is not None:
        return words, ""
    place = words.index("tfidf")
    del words[place - 1 : place + 1]
    return words, "tfidf was left out: scikit-learn is not installed"


def _versions(*names: str) -> dict[str, str | None]:
    from fastattn import versions

    return {name: versions.find(name) for name in names}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return schema.without_paths(lines[-1])[:300] if lines else "it said nothing"


def _clear(out: Path) -> None:
    """Delete an earlier run of the row; ValueError where the folder holds anything else."""
    if out.exists() and any(out.iterdir()):
        if not (out / STORED).is_file():
            raise ValueError(f"--out: {out} is not empty and holds no earlier run of the row")
        shutil.rmtree(out)


def _quoted(word: str) -> str:
    return f"'{word}'" if " " in word else word


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that either ends the step and stores what there is."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start(name: str, rows: dict[str, TaskRow], out: Path, **options: Any) -> Result:
    """Run the row of that name into OUT/NAME; see `benchmarks/tasks.py` for the options."""
    row, quick = rows[name], options["quick"]
    folder = out / name
    if quick:
        data, encoder = out / "data", out / "encoder"
        if not data.exists():
            row_files.tiny(data)
            row_files.tiny_encoder(encoder, data)
    else:
        data, encoder = options["data"], options["encoder"]
    minutes = options["minutes"] or row.minutes
    extra = 60 * minutes if options.get("resume") else None
    stored = [folder / STORED, *([options["store"]] if options["store"] else [])]
    job = Run(row, data.resolve(), encoder.resolve(), folder.resolve(), 60 * minutes, quick, tuple(stored))
    job.conditions, job.extra = options.get("conditions") or "", extra
    return run(job)
