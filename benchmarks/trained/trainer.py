"""The same recipe in transformers' Trainer: data, rate, batches and number of steps of a run of `fastattn train`.

python benchmarks/trained/trainer.py TASK --like RUN --out FOLDER [--seconds N]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkout

TASKS = ("classify", "tag", "qa", "seq2seq")
Figures = Callable[[Any], dict[str, float]]


def train(name: str, like: Path, out: Path, seconds: float | None = None) -> dict[str, Any]:
    """Train as the run in `like` did into `out`, a folder for `fastattn evaluate`; the figures of the training.

    The rows of tokens are ours, so that both read the same ones. Time limits end it at the next step.
    """
    import torch
    import transformers

    from fastattn.data.encoding import InputTokenizer
    from fastattn.models.embedding import encoder_folder
    from fastattn.train.optim import warmup_of
    from fastattn.train.run import TASKS as OURS
    from fastattn.train.task_config import presets_of, read_sections
    from fastattn.train.task_data import read_data

    task = OURS[name]
    report = json.loads((like / "report.json").read_text(encoding="utf-8"))
    overrides = [f"--train.output_dir={out}"]
    preset = report["model"] if report["model"] in presets_of(task)[1] else None
    sections = read_sections(
        task, preset=preset, file=str(like / "run.yaml"), overrides=overrides, defaults={}
    )
    data = read_data(task, report["train"]["files"], report["dev"]["files"], sections)
    # of random weights, the run's folder has the config and the tokenizer
    folder = encoder_folder(report["model"]) if preset is None else like
    tokenizer = InputTokenizer.from_pretrained(folder)
    sized = task.new_model(sections.model or report["model"], data.train, data.options, tokenizer)
    train_set, dev_set = (
        task.training_set(sized, tokenizer, e, data.options) for e in (data.train, data.dev)
    )
    config = sections.train
    transformers.set_seed(config.seed)
    model, figures, best = _model(
        transformers, name, folder, sized, task, tokenizer, data, preset is not None
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=report["steps"],
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[
            config.schedule
        ],
        warmup_steps=warmup_of(config.warmup_steps, report["steps"])[0],
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_epsilon=config.eps,
        max_grad_norm=config.grad_clip or 0.0,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # which bf16 wants said
        seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_on_start=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=best,
        greater_is_better=best != "loss",
        remove_unused_columns=False,
        label_names=["start_positions", "end_positions"] if name == "qa" else ["labels"],
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    started = time.monotonic()

    class Limit(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if seconds is not None and time.monotonic() - started > seconds:
                control.should_training_stop = control.should_evaluate = control.should_save = True

    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        batch = dict(train_set.collate(items))
        batch["attention_mask"] = batch["attention_mask"].long()
        if name == "qa":
            batch["start_positions"], batch["end_positions"] = batch.pop("labels").unbind(1)
        return batch

    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_set,
        eval_dataset=dev_set,
        compute_metrics=figures,
        callbacks=[Limit()],
    )
    trainer.train()
    took = time.monotonic() - started
    trainer.save_model(str(out))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    steps = int(trainer.state.global_step)
    return {
        "seconds": took,
        "steps": steps,
        "cut": steps < report["steps"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": [
            {"step": each["step"], "loss": each["eval_loss"]}
            for each in trainer.state.log_history
            if "eval_loss" in each
        ],
    }


def _model(
    transformers: Any, name: str, folder: Path, sized: Any, task: Any, tokenizer: Any, data: Any, random: bool
) -> tuple[Any, Figures | None, str]:
    """transformers' model of a folder, or with random weights of its config, what it is evaluated by on the dev set,
    and the figure that picks the best."""
    if random:
        if name != "seq2seq":
            raise ValueError(f"--like: {name} from a preset has no peer, needs seq2seq")
        return transformers.EncoderDecoderModel(transformers.AutoConfig.from_pretrained(folder)), None, "loss"
    if name == "seq2seq":
        model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(str(folder), str(folder))
        ours = sized.config
        for key in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
            setattr(model.config, key, getattr(ours, key))
        model.config.vocab_size = model.config.decoder.vocab_size
        return model, None, "loss"
    if name == "qa":
        model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
        windows = task.windows_of(sized, tokenizer, data.dev, data.options)
        return model, _answers(task, windows, data.dev), "f1"
    labels = list(sized.config.labels())
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    kind = {"classify": "SequenceClassification", "tag": "TokenClassification"}[name]
    cls = getattr(transformers, f"AutoModelFor{kind}")
    model = cls.from_pretrained(folder, num_labels=len(labels), **named)
    if name == "classify":
        return (
            model,
            lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
            "accuracy",
        )
    return model, _entities(labels), "f1"


def _entities(labels: list[str]) -> Figures:
    """Strict F1 of the entities of the pieces that have labels."""
    from fastattn.evaluation.spans import entity_f1

    def figures(seen: Any) -> dict[str, float]:
        chosen = seen.label_ids != -100
        expected = [[labels[i] for i in row[keep]] for row, keep in zip(seen.label_ids, chosen)]
        found = [[labels[i] for i in row[keep]] for row, keep in zip(seen.predictions.argmax(-1), chosen)]
        return {"f1": entity_f1(expected, found).metrics["f1"]}

    return figures


def _answers(task: Any, windows: Any, examples: Any) -> Figures:
    """Exact match and F1 by our decoding of both models' logits."""
    import torch

    from fastattn.evaluation.answers import answers

    def figures(seen: Any) -> dict[str, float]:
        starts, ends = (torch.from_numpy(np.ascontiguousarray(each)) for each in seen.predictions[:2])
        at, found = 0, []
        for example, rows in zip(examples, windows):
            spans = [
                task.decode(starts[at + i, : len(r.ids)], ends[at + i, : len(r.ids)], r, 1)
                for i, r in enumerate(rows)
            ]
            at += len(rows)
            best, _ = task.best_answers(spans, 1)
            found.append(example.context[best[0][1] : best[0][2]] if best else None)
        return dict(answers([[text for text, _ in e.answers] for e in examples], found).metrics)

    return figures


def main() -> int:
    """The command line; prints one JSON object."""
    parser = argparse.ArgumentParser(
        description="The recipe of a run of fastattn train in transformers' Trainer."
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--like", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seconds", type=float, help="stop training after so long")
    options = parser.parse_args()
    checkout.make_importable()
    print(json.dumps(train(options.task, options.like, options.out, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
