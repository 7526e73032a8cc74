"""The output directory of a run: the best model, and resumable checkpoints in subfolders, all written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import nn

from fastattn.data.tokenization import Tokenizer
from fastattn.models.checkpoint.folder import GENERATION, INDEX
from fastattn.models.checkpoint.pretrained import Pretrained
from fastattn.models.checkpoint.save import SHARD, TOKENIZER_FILES
from fastattn.models.checkpoint.swap import UNFINISHED, delete, naming, sync
from fastattn.models.lora import adapters_of
from fastattn.models.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, save_adapter
from fastattn.train.resume import STATE, WEIGHTS, DamagedCheckpoint, check
from fastattn.train.sections import ConfigError
from fastattn.train.trackers import BOARD, RUNS

LOG = "log.jsonl"
RESOLVED_CONFIG = "train_config.yaml"
REPORT, OPTIONS, ADAPTER, CURVE = "report.json", "run.yaml", "adapter", "loss.png"  # of `fastattn train`
# What a run leaves at the top of its directory beside checkpoints and shards of weights, the log first: without it
# nothing goes on with a run that is half deleted.
OF_A_RUN = (
    LOG,
    WEIGHTS,
    INDEX,
    "config.json",
    GENERATION,
    RESOLVED_CONFIG,
    OPTIONS,
    CURVE,
    ADAPTER,
    BOARD,
    RUNS,
    *TOKENIZER_FILES,  # one that stays would keep those of the new model's folder out
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r".+\.\d+-[0-9a-f]{8}\.partial")  # of a `write_atomically` that was killed
_ASIDE = f"{UNFINISHED}old-"  # a checkpoint that a newer one of the same step replaces


class RunDirectory:
    """The folder of a run.

    DIR/ holds the model with the lowest validation loss so far (the newest when nothing is held out), loadable by
    `from_pretrained` (with adapters: by `fastattn.models.load`), with log.jsonl and train_config.yaml;
    DIR/checkpoint-STEP/ holds everything that is needed to continue from STEP.

    Args:
        path: the directory; created when the run starts.
        resume: "never", "auto" (the newest complete checkpoint in `path`, or a new run if there is none), or a
            checkpoint. `passed_over` has the checkpoints that "auto" skips, with the reasons.
        overwrite: delete an earlier run in `path` when this one starts.
        model: the model to resume, which may have its own format of weights.

    Raises:
        ConfigError: the directory cannot be written; it holds a run and neither or both of resume and overwrite are
            given; or the checkpoint to resume from is missing or damaged (with "auto", all checkpoints are). Nothing
            has been written then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume: str = "never",
        overwrite: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self.passed_over: dict[str, str] = {}  # a checkpoint's name -> its fault
        for name, text in (("output_dir", str(self.path)), ("resume", resume)):
            if "\0" in text:
                raise ConfigError(f"{name}: got {text!r}, needs a path without a zero byte")
        if overwrite and resume != "never":
            raise ConfigError(f"overwrite: cannot be combined with resume={resume!r}")
        _check_writable(self.path)
        if resume != "never":
            self._put_back()
        self.resume_from = self._find_checkpoint(resume, model)
        restarts = resume == "auto" and (self.path / LOG).exists()  # stopped before its first checkpoint
        if not (restarts or overwrite or self.resumes_here) and self._holds_run():
            raise ConfigError(
                f'output_dir: {self.path} already holds a run; resume it with resume="auto", '
                f"replace it with overwrite=true, or choose another directory"
            )
        if self.resumes_here and self.checkpoints()[-1].name != Path(resume).name != "auto":
            newest = self.checkpoints()[-1]
            raise ConfigError(
                f"resume: {self.path} also holds the newer {newest.name}; delete it or choose another output_dir"
            )

    @property
    def resumes_here(self) -> bool:
        """Whether the checkpoint to resume from is in this folder, which then holds the best model of its run."""
        return self.resume_from is not None and self.resume_from.parent.resolve() == self.path.resolve()

    def _holds_run(self) -> bool:
        names = (LOG, STATE, WEIGHTS, "config.json")
        return bool(self.checkpoints()) or any((self.path / name).exists() for name in names)

    def _find_checkpoint(self, resume: str, model: nn.Module | None) -> Path | None:
        if resume == "never":
            return None
        if resume == "auto":
            return self._newest_complete(model)
        checkpoint = Path(resume)
        try:
            check(checkpoint, model)
        except DamagedCheckpoint as error:
            raise ConfigError(f"resume: {error}") from None
        return checkpoint

    def _put_back(self) -> None:
        """Restore a checkpoint that `publish` had moved aside when it was killed before the new one was in place."""
        for aside in self.path.glob(f"{_ASIDE}*") if self.path.is_dir() else ():
            final = self.path / aside.name.removeprefix(_ASIDE)
            if CHECKPOINT.fullmatch(final.name) and not final.exists():
                with contextlib.suppress(FileNotFoundError):  # another process has restored it
                    aside.rename(final)

    def _newest_complete(self, model: nn.Module | None) -> Path | None:
        """The newest complete checkpoint; None where there is no checkpoint at all."""
        for checkpoint in reversed(self._numbered()):
            try:
                check(checkpoint, model)
            except DamagedCheckpoint as error:
                self.passed_over[checkpoint.name] = str(error)
                continue
            return checkpoint
        if self.passed_over:
            raise ConfigError(
                f"resume: no checkpoint in {self.path} is complete; delete them to start a new run. "
                + "; ".join(self.passed_over.values())
            )
        return None

    def _numbered(self) -> list[Path]:
        """Folders named as checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = ((CHECKPOINT.fullmatch(entry.name), entry) for entry in self.path.iterdir())
        numbered = [(int(m[1]), entry) for m, entry in found if m and entry.is_dir() and any(entry.iterdir())]
        return [entry for _, entry in sorted(numbered)]

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this run, oldest first, without damaged ones that were skipped."""
        return [
            entry
            for entry in self._numbered()
            if (entry / STATE).is_file() and entry.name not in self.passed_over
        ]

    def check_space(self, model: nn.Module, keep: int, *, averaged: bool = False) -> None:
        """Raise ConfigError unless the disk holds the best model and `keep` + 1 checkpoints with two moments, and with
        the average of the trained weights if there is one."""
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
        weights, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
        need = weights + (keep + 1) * (weights + (2 + averaged) * trained)
        free = shutil.disk_usage(_existing(self.path)).free
        if free < need:
            raise ConfigError(
                f"output_dir: {self.path} has {free / 1e9:.2f} GB free, needs {need / 1e9:.2f} GB for the best model "
                f"and {keep + 1} checkpoints (keep_checkpoints + 1 while one is written)"
            )

    def prepare(self) -> None:
        """Create the directory; delete an earlier run, with `overwrite`, and unfinished writes."""
        self.path.mkdir(parents=True, exist_ok=True)
        delete(self.path / REPORT)  # of a run that had ended and now goes on
        if self.overwrite:
            for name in OF_A_RUN:
                delete(self.path / name)
        for entry in list(self.path.iterdir()):
            unfinished = entry.name.startswith(UNFINISHED) or _PARTIAL.fullmatch(entry.name)
            earlier = CHECKPOINT.fullmatch(entry.name) or SHARD.fullmatch(entry.name)
            if unfinished or (self.overwrite and earlier):
                delete(entry)

    def begin_checkpoint(self, step: int) -> Path:
        """A new folder for the files of checkpoint-`step`, which is none before `end_checkpoint`."""
        folder = self.path / f"{UNFINISHED}checkpoint-{step}"
        delete(folder)
        folder.mkdir()
        return folder

    def end_checkpoint(self, folder: Path, write: Callable[[Path], None], keep: int) -> Path:
        """Complete a checkpoint by `write(folder)` and give it its name, then delete all but the newest `keep`."""
        final = self.path / folder.name.removeprefix(UNFINISHED)
        with naming(folder):
            write(folder)
        publish(folder, final)
        self.passed_over.pop(final.name, None)
        for old in self.checkpoints()[:-keep]:
            if old != final:
                delete(old)
        return final

    def save_model(self, model: nn.Module, tokenizer: Tokenizer | None) -> None:
        """Write the model's files to the output directory, each replaced atomically, the weights last.

        The directory itself is not replaced, because processes may work in it, so this does not call `write_folder`.
        """
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=self.path) as scratch:
            with naming(Path(scratch)):
                write_model(model, Path(scratch), tokenizer)
            files = [file for file in Path(scratch).rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file.name == WEIGHTS):
                sync(file)
                final = self.path / file.relative_to(scratch)
                final.parent.mkdir(exist_ok=True, parents=True)
                file.replace(final)
        sync(self.path)


def write_model(model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> None:
    """model.safetensors, config.json where the model has one, and the tokeniser's files.

    For a model with adapters, model.safetensors is for resuming, and an adapter's folder in PEFT's format is written
    too, which `fastattn.models.load` attaches to the base model that it names.
    """
    save: Callable[[Path], object] | None = getattr(model, "save_pretrained", None)
    if _has_adapters(model):
        _save_weights(model, folder / WEIGHTS)
        save_adapter(model, folder)
    elif isinstance(model, Pretrained):  # one file of any size, which replaces the old one atomically
        model.save_pretrained(folder, max_shard_size=sys.maxsize)
    elif save is not None:
        save(folder)
    else:
        _save_weights(model, folder / WEIGHTS)
        config = getattr(model, "config", None)
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            text = json.dumps(dataclasses.asdict(config), indent=2)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_weights(model: nn.Module, path: Path) -> None:
    with naming(path):  # it is written under a name of safetensors' own first
        save_safetensors(model, str(path))


def read_model(model: nn.Module, folder: Path) -> None:
    """Load the weights that `write_model` wrote into `model`, every one of them."""
    load: Callable[[Path], nn.Module] | None = getattr(type(model), "from_pretrained", None)
    try:
        if load is not None and not _has_adapters(model):
            model.load_state_dict(load(folder).state_dict())
        else:
            device = str(next(model.parameters()).device)
            load_safetensors(model, folder / WEIGHTS, strict=True, device=device)
    except (RuntimeError, ValueError) as error:  # for tensors of other shapes or names
        raise DamagedCheckpoint(f"{folder / WEIGHTS}: does not fit this model ({error})") from None


def _has_adapters(model: nn.Module) -> bool:
    """Whether it is one of our models with adapters, which `save_pretrained` refuses."""
    return isinstance(model, Pretrained) and any(True for _ in adapters_of(model))


def publish(folder: Path, final: Path) -> None:
    """Rename a written folder to its final name once all of it is on disk, replacing an existing one."""
    for entry in folder.rglob("*"):
        sync(entry)
    sync(folder)
    if final.exists():
        doomed = final.with_name(f"{_ASIDE}{final.name}")
        delete(doomed)
        final.rename(doomed)
        folder.rename(final)
        delete(doomed)
    else:
        folder.rename(final)
    sync(final.parent)


def _check_writable(path: Path) -> None:
    """Raise ConfigError unless files can be created in `path`, or in the nearest directory above that exists."""
    try:
        existing = _existing(path)
        if not existing.is_dir():
            raise ConfigError(
                f"output_dir: {path} cannot be created, {existing} is a file, needs a directory"
            )
        with tempfile.TemporaryFile(prefix=UNFINISHED, dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be written ({error.strerror or error})") from None


def _existing(path: Path) -> Path:
    """`path`, or the nearest place above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
