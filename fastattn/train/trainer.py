"""The training loop: any module whose forward(**batch) returns an object with a mean loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from fastattn.data.packing import IndexSampler
from fastattn.data.tokenization import Tokenizer
from fastattn.models.checkpoint.swap import delete
from fastattn.train.arguments import check_arguments, check_evaluation, check_inputs
from fastattn.train.batches import Batch, Batches, Examples
from fastattn.train.checkpoint import LOG, RESOLVED_CONFIG, RunDirectory
from fastattn.train.config import TrainConfig, step_limit
from fastattn.train.distributed import Distributed, usable_device, usable_dtype
from fastattn.train.evaluating import Evaluator, is_gain
from fastattn.train.loading import WorkerBatches
from fastattn.train.log import Record, RunLog
from fastattn.train.metrics import (
    LOSS,
    Evaluation,
    count_tokens,
    figures_of,
    peak_flops,
    peak_memory,
    training_flops,
)
from fastattn.train.objective import Objective
from fastattn.train.progress import NoDisplay, ProgressDisplay, default_display
from fastattn.train.recompute import blocks_of, recomputing
from fastattn.train.rng import (
    allow_deterministic_cublas,
    deterministic_algorithms,
    seed_all,
    seeded,
)
from fastattn.train.sections import ConfigError, save_config
from fastattn.train.sharding import Sharding
from fastattn.train.signals import StopRequest
from fastattn.train.snapshot import Snapshot
from fastattn.train.state import FitResult, TrainState
from fastattn.train.trackers import Trackers, missing
from fastattn.train.updates import (
    SHOWN_EXAMPLES,
    TrainingDiverged,
    Update,
    Updates,
    listed,
)


class Trainer:
    """Trains a model with AdamW or Muon, and keeps a log, the best model and resumable checkpoints.

    A step minimises the mean loss over the targets of all its micro-batches on all processes: each micro-batch's mean
    is weighted by its number of labels that are not -100, so the gradient is that of one large batch. On a CPU with
    the same number of threads, and on CUDA with deterministic=True, a run is reproducible from its seed, and one that
    was stopped and resumed ends with the same bits as one that was not. Under torchrun the model trains as
    DistributedDataParallel, or with sharding="fsdp" by FSDP2.

    Args:
        model: its forward takes a batch's tensors by name and returns an object whose `.loss` is the mean over targets.
            `shifts_labels = True` on it says that each row's first label is never a target. It is moved to the device
            and trained in place.
        config: see TrainConfig.
        train_data: items by index; collated, a dict of tensors with "labels".
        dev_data: the same, held out; None means no evaluation.
        tokenizer: saved with the model.
        collate: makes a batch from a list of items. It runs in this process, or in one of loader_workers; random
            numbers from torch's, Python's or NumPy's global generator are reproducible.
        display: shows the progress; by default a bar in a terminal and lines elsewhere.
        on_record: called with each record of the log.
        evaluate_with: returns metrics of the model at each evaluation, as {"accuracy": 0.9}, in addition to its loss on
            dev_data, under names other than event, step, loss, perplexity and seconds. It gets the model in eval mode,
            on the first process only.
        best: the metric that selects the best model and that patience counts, and whether higher is better:
            ("loss", False), or the name of one that evaluate_with returns.
        show_with: returns a text for the model at each evaluation, such as a sample; it is shown and logged.
        inputs: what the run is made from, in JSON's types: saved with each checkpoint, for a check when a run resumes.
        where: returns the place of an item of train_data by its index, such as a file and a line, for the error and the
            log of a batch whose loss or gradient is not finite.

    Raises:
        ConfigError: the output directory, the disk, the device or the precision cannot be used, a tracker is not
            installed, or update_in_backward is asked of several processes.
        TypeError: an argument has a wrong type.
        ValueError: a data set is empty, the model has nothing to train, or no blocks for activation_checkpointing or
            Muon, or evaluate_with, best and show_with do not fit each other or dev_data.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_data: Examples,
        dev_data: Examples | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        collate: Callable[[list[Any]], Batch] = default_collate,
        display: ProgressDisplay | None = None,
        on_record: Callable[[Record], None] | None = None,
        evaluate_with: Callable[[nn.Module], Mapping[str, float]] | None = None,
        best: tuple[str, bool] = (LOSS, False),
        show_with: Callable[[nn.Module], str] | None = None,
        inputs: Mapping[str, Any] | None = None,
        where: Callable[[int], str] | None = None,
    ) -> None:
        check_arguments(model, config, train_data, dev_data, tokenizer, collate, on_record, where)
        check_inputs(inputs)
        check_evaluation(dev_data, evaluate_with, best, show_with)
        for name, data in (("train_data", train_data), ("dev_data", dev_data)):
            if data is not None and len(data) == 0:
                raise ValueError(f"{name}: is empty, needs at least one example")
        self.config = config
        if config.deterministic:
            allow_deterministic_cublas()  # before the device's first matrix product
        if config.activation_checkpointing and not blocks_of(model):
            raise ValueError("activation_checkpointing: the model has no blocks in an nn.ModuleList")
        if lacking := missing(config.trackers):
            raise ConfigError(f"trackers: {lacking} is not installed")
        self.device = usable_device(config.device)
        self.dtype = usable_dtype(config.precision, self.device)
        self.distributed = Distributed(self.device)
        if config.update_in_backward and self.distributed.active:
            raise ConfigError(
                "update_in_backward: needs one process, whose gradients are not summed with others'"
            )
        self.directory = self.distributed.on_first(
            lambda: RunDirectory(
                config.output_dir, resume=config.resume, overwrite=config.overwrite, model=model
            )
        )
        self.directory.check_space(model, config.keep_checkpoints, averaged=config.ema_decay is not None)
        sharded = config.sharding == "fsdp" and self.distributed.active
        self.sharding = Sharding(model, self.device) if sharded else None
        self.model = model.to(self.device)
        self.train_data, self.dev_data = train_data, dev_data
        self.tokenizer = tokenizer
        self.batches = Batches(collate, self.device)
        rank, world_size = self.distributed.rank, self.distributed.world_size
        self.sampler = IndexSampler(len(train_data), config.seed, rank=rank, world_size=world_size)
        self.max_steps = step_limit(config, len(train_data), world_size)
        self.display = (display or default_display()) if self.distributed.is_main else NoDisplay()
        self.on_record = on_record
        self.where = where
        self.best, self.show_with = best, show_with
        self.log = RunLog(None, resume_step=None)
        self.state = TrainState()
        self._compiled: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
        if self.sharding is not None:
            parallel = self._compiled = self.sharding.root
        else:
            parallel = self.distributed.wrap(self._compiled, self.device)
        self.objective = Objective(
            model, parallel, self.device, self.dtype, self.distributed, self._warn, sharded=sharded
        )
        self.evaluator = Evaluator(
            model,
            self._compiled,
            config,
            self.objective,
            self.batches,
            self.distributed,
            evaluate_with,
            self.sharding,
        )
        self.updates = Updates(model, config, self.objective, self.max_steps)
        self.optimizer, self.averaged = self.updates.optimizer, self.updates.averaged
        self.snapshot = Snapshot(
            config,
            model,
            tokenizer,
            self.optimizer,
            self.averaged,
            self.objective.scaler,
            self.sampler,
            self.distributed,
            self.device,
            inputs,
        )
        self._peak_flops = (
            peak_flops(self.device, self.dtype) if config.peak_tflops is None else config.peak_tflops * 1e12
        )
        self._counted_flops: float | None = None  # per token
        self._shown: dict[str, float] = {}
        self._trackers: Trackers | None = None
        self._loader: WorkerBatches | None = None
        self._started = time.monotonic()
        self._saved_at: float | None = None  # the run's seconds after its last checkpoint, on all processes
        self._used = False

    def fit(self) -> FitResult:
        """Train until a limit of the configuration, early stopping, Ctrl-C or SIGTERM, and write a final checkpoint.

        Raises:
            TrainingDiverged: the loss or a gradient is not finite; the newest checkpoint is from before that.
            ConfigError: the run that is resumed had other options that decide the order of data or the state, or its
                checkpoint is damaged.
            ValueError: all labels of dev_data are ignored, or a metric of evaluate_with is missing or not a number.
            OSError: a file of the run cannot be written.
            KeyboardInterrupt: Ctrl-C came a second time, before the checkpoint was written.
            RuntimeError: this trainer has run before; a new one with resume="auto" continues the run.
        """
        if self._used:
            raise RuntimeError('fit: a trainer runs once; create another, with resume="auto" to continue')
        self._used = True
        try:
            return self._fit()
        finally:
            if self._loader is not None:
                self._loader.close()
            if self._trackers is not None:
                self._trackers.close()

    def _fit(self) -> FitResult:
        config = self.config
        with StopRequest() as stop, deterministic_algorithms(config.deterministic, self.device):
            self._begin()
            if config.loader_workers:
                self._loader = WorkerBatches(
                    self.train_data,
                    self.batches.collate,
                    self.sampler,
                    config.batch_size,
                    config.seed,
                    config.loader_workers,
                    pin=self.device.type == "cuda",
                )
            self.display.start(self._progress())
            try:
                with recomputing(self.model, config.activation_checkpointing):
                    while True:
                        signalled = self._signalled(stop)
                        reason = self._reason_to_stop()
                        if signalled or reason:
                            break
                        self._train_step()
                        self._after_step()
                checkpoint = self._finish(evaluate=reason is not None)
            finally:
                self.display.stop()
        state, memory = self.state, peak_memory(self.device)
        flops = self._flops(interrupted=reason is None)
        stopped = (
            reason
            or f"stopped by {stop.signal_name or 'a signal to another process'}, {state.step} steps done"
        )
        self.log.add(
            "end", state.step, stopped=stopped, seconds=self._seconds(), flops=flops, peak_memory=memory
        )
        self.display.note(
            f"{stopped}: {self._seconds():.0f} s"
            + ("" if flops is None else f", {flops:.3g} FLOPs")
            + f", {memory / 1e9:.2f} GB at the peak; checkpoint: {checkpoint}"
        )
        return FitResult(
            stopped=stopped,
            interrupted=reason is None,
            steps=state.step,
            epochs=self.sampler.epochs,
            tokens=state.tokens,
            seconds=self._seconds(),
            flops=flops,
            peak_memory=memory,
            first=state.first,
            best=state.best,
            last=state.last,
            log=self.log.records,
            checkpoint=checkpoint,
        )

    def evaluate(self, data: Examples | None = None) -> Evaluation:
        """Mean loss per target of the averaged weights if there are any, else of the weights themselves.

        Random generators are restored. All processes call it together.

        Args:
            data: items by index, as train_data; None for dev_data.

        Returns:
            An `Evaluation` with `loss`, `perplexity`, `targets`, and for dev_data the metrics of evaluate_with as
            `figures`.

        Raises:
            ValueError: there is no data, or all its labels are ignored.
        """
        if data is None and self.dev_data is None:
            raise ValueError("data: got None, needs data, because the trainer has no dev_data")
        with self._averaged_in_place():
            if data is None:
                assert self.dev_data is not None
                return self.evaluator.evaluate(self.dev_data)
            return self.evaluator.evaluate(data, with_figures=False)

    def _averaged_in_place(self) -> AbstractContextManager[None]:
        return nullcontext() if self.averaged is None else self.averaged.in_place()

    def _flops_per_token(self, batch: Batch) -> float:
        """Floating-point operations of a training step for a token, counted once, on some batch."""
        if self._counted_flops is None:
            model = self.model if self.sharding is None else self.sharding.root
            counted = training_flops(self.model, lambda: self.objective.loss(model, batch), batch)
            self._counted_flops = counted / max(count_tokens(batch), 1)
        return self._counted_flops

    def _flops(self, *, interrupted: bool) -> float | None:
        """Floating-point operations of all training steps; None where a signal came before they were counted."""
        if self._counted_flops is None and not interrupted:
            size = min(self.config.batch_size, len(self.train_data))
            with seeded(self.config.seed, self.device):  # collate may use random numbers
                self._flops_per_token(self.batches.of(self.train_data, range(size)))
        return None if self._counted_flops is None else self._counted_flops * self.state.tokens

    def _begin(self) -> None:
        """Create the output directory, then start a new run or load the checkpoint."""
        config, source = self.config, self.directory.resume_from
        seed_all(config.seed + self.distributed.rank)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        if source is not None:
            self.state, notes = self.snapshot.load(source)
        if self.distributed.is_main:
            self.directory.prepare()
            save_config({"train": config}, self.directory.path / RESOLVED_CONFIG)
            resume_step = None if source is None else self.state.step
            if config.trackers:
                self._trackers = Trackers(
                    config.trackers, self.directory.path, asdict(config), resume_step=resume_step
                )
            self.log = RunLog(self.directory.path / LOG, resume_step=resume_step, on_record=self._recorded)
        self.distributed.barrier()
        self._started = time.monotonic() - self.state.seconds
        for reason in self.directory.passed_over.values():
            self._warn(f"a damaged checkpoint was skipped and left in place: {reason}")
        if source is not None:
            for note in notes:
                self._warn(note)
            self.display.note(f"resumed at step {self.state.step} from {source}")
            if self.dev_data is not None and not self.directory.resumes_here:
                # the best model so far is not here, and that of the other folder may be of a later step
                self.state.best = None
                self._evaluate_and_keep()
        elif self.dev_data is not None:
            self._evaluate_and_keep()
            self.state.first = self.state.last

    def _recorded(self, record: Record) -> None:
        if self._trackers is not None:
            self._trackers.add(record)
        if self.on_record is not None:
            self.on_record(record)

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _signalled(self, stop: StopRequest) -> bool:
        """Whether a process got a signal; also updates the state's clock, which schedules may follow."""
        seconds = self._seconds() if self.distributed.is_main else 0.0
        signals, self.state.seconds = self.distributed.sum(
            [stop.signal_name is not None, seconds], self.device
        )
        if self._saved_at is None:
            self._saved_at = self.state.seconds
        return signals > 0

    def _reason_to_stop(self) -> str | None:
        """The reason for ending the run, the same on all processes; None to continue."""
        config, state = self.config, self.state
        if self.max_steps is not None and state.step >= self.max_steps:
            return f"done after {state.step} steps"
        if config.max_seconds is not None and state.seconds >= config.max_seconds:
            return f"done after {state.seconds:.0f} s, {state.step} steps"
        if config.patience is not None and state.evaluations_without_gain >= config.patience:
            return f"done after {state.step} steps: no gain in {config.patience} evaluations"
        return None

    def _progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        by_step = self.state.step / self.max_steps if self.max_steps else 0.0
        by_time = self.state.seconds / self.config.max_seconds if self.config.max_seconds else 0.0
        return min(max(by_step, by_time), 1.0)

    def _train_step(self) -> None:
        config, state = self.config, self.state
        begun = time.monotonic()
        progress = self._progress()
        indices = [self.sampler.next_batch(config.batch_size) for _ in range(config.accumulate)]
        if self._loader is not None:
            batches = [self.batches.moved(next(self._loader)) for _ in indices]
        else:
            batches = [self.batches.of(self.train_data, part) for part in indices]
        if self._peak_flops:
            self._flops_per_token(batches[0])
        update = self.updates.take(batches, state.step, progress)
        if update.taken:
            state.nonfinite_in_a_row = 0
        else:
            self._reject(update, indices)
        state.step += 1
        state.tokens += update.tokens
        sums = {"steps": 1, "loss": update.loss, "tokens": update.tokens, "seconds": time.monotonic() - begun}
        for name, value in sums.items():
            state.window[name] = state.window.get(name, 0.0) + value
        state.window.update(lr=update.rate, grad_norm=update.norm)

    def _reject(self, update: Update, indices: list[list[int]]) -> None:
        """Skip the step with a warning, or raise TrainingDiverged."""
        state, config = self.state, self.config
        state.nonfinite_in_a_row += 1
        if config.on_nonfinite == "skip" and state.nonfinite_in_a_row <= config.max_nonfinite:
            self._warn(f"{update}: step skipped, {state.nonfinite_in_a_row} in a row")
            self.updates.discard()
            return
        figures: dict[str, Any] = {"loss": update.loss, "grad_norm": update.norm, "lr": update.rate}
        found = self.updates.not_finite(indices)
        examples, processes = found.examples, found.processes
        places = [] if self.where is None else [self.where(index) for index in examples[:SHOWN_EXAMPLES]]
        if self.where is not None:
            figures["where"] = places
        if self.distributed.world_size > 1:
            figures["processes"] = processes
        self.log.add("diverged", state.step, **figures, parameter=found.parameter, examples=examples)
        kept = self.directory.checkpoints()
        raise TrainingDiverged(
            f"step {state.step}: {update}"
            + (f"; first in the gradient of {found.parameter}" if found.parameter else "")
            + f"; in the batch of training examples {listed(examples, places)}"
            + (
                f"; of process {', '.join(map(str, processes))}"
                if "processes" in figures and processes
                else ""
            )
            + (f"; the newest checkpoint is {kept[-1]}" if kept else "; there is no checkpoint yet")
            + "; try a lower lr or more warmup_steps"
        )

    def _after_step(self) -> None:
        """Log, evaluate and save if this step asks for it."""
        step, config = self.state.step, self.config
        if step == 1 or step % config.log_every == 0:
            self._log_window()
        if self.state.window:
            self._shown = self._figures()
        self.display.step(self._progress(), {"step": step, **self._shown})
        if self.dev_data is not None and config.eval_every and step % config.eval_every == 0:
            self._evaluate_and_keep()
        if (config.save_every and step % config.save_every == 0) or self._saves_by_time():
            self._save()

    def _saves_by_time(self) -> bool:
        """Whether the time for a checkpoint has come, by the first process's clock; the same on all processes."""
        every, since = self.config.save_seconds, self._saved_at
        return every is not None and since is not None and self.state.seconds - since >= every

    def _finish(self, *, evaluate: bool) -> Path:
        """Final evaluation and saving; an interrupted run only saves, and evaluates when it is resumed."""
        if evaluate and self.state.window:
            self._log_window()
        if evaluate and self.dev_data is not None and self.state.evaluated_step != self.state.step:
            self._evaluate_and_keep()
        return self._save()

    def _figures(self) -> dict[str, float]:
        """Loss, speed and the rest over the steps since the last "train" record."""
        peak = self._peak_flops and self._peak_flops * self.distributed.world_size
        return figures_of(self.state.window, peak, self._counted_flops)

    def _log_window(self) -> None:
        self._shown = self._figures()
        self.state.window = {}
        done = {"tokens": self.state.tokens, "epochs": self.sampler.epochs, "seconds": self._seconds()}
        self.log.add("train", self.state.step, **self._shown, **done)

    def _warn(self, text: str) -> None:
        self.log.add("warning", self.state.step, text=text)
        self.display.note(f"WARNING: step {self.state.step}: {text}")

    def _evaluate_and_keep(self) -> None:
        """Evaluate, and save the model in the output directory if it is the best so far."""
        state = self.state
        state.last, state.evaluated_step = self.evaluate(), state.step
        last = state.last
        seconds = self._seconds()
        self.log.add(
            "eval", state.step, loss=last.loss, perplexity=last.perplexity, **last.figures, seconds=seconds
        )
        self.display.note(f"step {state.step}: validation {last}")
        if is_gain(last, state.best, self.best):
            state.best, state.evaluations_without_gain = last, 0
            self._save_model()
        else:
            state.evaluations_without_gain += 1
        if self.show_with is not None:
            self._show(self.show_with)

    def _show(self, show_with: Callable[[nn.Module], str]) -> None:
        with self._averaged_in_place():
            text = self.evaluator.shown(show_with)
        if self.distributed.is_main:
            self.log.add("sample", self.state.step, text=text)
            self.display.note(text)

    def whole_model(self) -> nn.Module:
        """The model with all its parameters: itself, or of a sharded one a copy on the CPU of the first process.

        All processes call it together; those besides the first get the sharded model back.
        """
        if self.sharding is None:
            return self.model
        return self.sharding.gathered(self.distributed.is_main) or self.model

    def _save_model(self) -> None:
        with self._averaged_in_place():
            model = self.whole_model()
            self.distributed.on_first(lambda: self.directory.save_model(model, self.tokenizer))

    def _save(self) -> Path:
        """Write a checkpoint; without dev_data the newest model is also saved in the output directory."""
        self.state.seconds = self._seconds()
        generators = self.snapshot.generators()
        on_first, keep = self.distributed.on_first, self.config.keep_checkpoints
        folder = on_first(lambda: self.directory.begin_checkpoint(self.state.step))
        try:
            self.snapshot.write_shards(folder)
            final = on_first(
                lambda: self.directory.end_checkpoint(
                    folder, lambda place: self.snapshot.write(place, self.state, generators), keep
                )
            )
        except BaseException:
            if self.distributed.is_main:
                delete(folder)
            raise
        if self.dev_data is None:
            self._save_model()
        self._saved_at = None
        return final
