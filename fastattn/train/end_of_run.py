"""The end of a run of `fastattn train`: its best model, the figures of the dev set and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastattn import plot
from fastattn.models.lora import merge
from fastattn.models.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, save_adapter
from fastattn.tasks import causal_lm, chat, masked_lm, seq2seq, tag
from fastattn.train.checkpoint import ADAPTER, read_model
from fastattn.train.loss_curve import plot_loss
from fastattn.train.prepared import Prepared
from fastattn.train.resume import WEIGHTS
from fastattn.train.state import FitResult

OF_TOKENS = (causal_lm, chat, masked_lm, seq2seq, tag)  # tasks whose loss is a mean over tokens


def best_model(prepared: Prepared, model: Any, out: Path) -> nn.Module:
    """The best model of the run, from OUT; adapters are merged into it, and kept in OUT/adapter."""
    if prepared.sections.lora.r is None:
        read_model(model, out)
    else:
        with safe_open(out / WEIGHTS, "pt") as weights:
            merged = not any(".lora." in name for name in weights.keys())  # noqa: SIM118 - no dict
        if merged:  # by this run before it was killed, or by a finished run
            model = type(model).from_pretrained(out, dtype=torch.float32)
        else:
            read_model(model, out)
            save_adapter(model, out / ADAPTER)
            merge(model).save_pretrained(out, tokenizer=prepared.saved_tokenizer)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (out / name).unlink(missing_ok=True)
    return model


def evaluated(prepared: Prepared, model: nn.Module) -> Any:
    """The task's `Report` of the dev set."""
    size = prepared.sections.train.batch_size
    if hasattr(prepared.task, "evaluate_set"):
        return prepared.task.evaluate_set(model, prepared.dev_set, batch_size=size)
    return prepared.task.evaluate(
        model, prepared.tokenizer, prepared.data.dev, batch_size=size, options=prepared.data.options
    )


def draw_loss(prepared: Prepared, result: FitResult, path: Path, say: Callable[[str], object]) -> None:
    """Draw the run's losses to `path`; where that cannot be done a line says why, as the run itself is complete."""
    if not plot.is_available():
        say(f"no {path.name}: matplotlib is not installed; {plot.INSTALL}")
        return
    unit = "nats per token" if prepared.task in OF_TOKENS else None
    try:
        plot_loss(result.log, path, unit=unit)
    except Exception as error:
        say(f"no {path.name}: {' '.join(str(error).split())}")


def report_of(prepared: Prepared, result: FitResult, best: tuple[str, bool]) -> dict[str, Any]:
    """What report.json holds."""
    inputs, data = prepared.inputs, prepared.data
    labels = prepared.task.labels_in(data.train)
    return {
        "task": inputs.task,
        "model": inputs.model,
        "out": inputs.out,
        "train": {"files": list(inputs.train), "examples": len(data.train), "items": len(prepared.train_set)},
        "dev": {
            "files": list(inputs.dev),
            "examples": len(data.dev),
            "held_out_of_train": data.held_out is not None,
            "cut_tokens": getattr(prepared.dev_set, "cut", 0),
            "cut_texts": getattr(prepared.dev_set, "cut_rows", 0),
        },
        "labels": None if labels is None else list(labels),
        "cleaning": data.cleaning,
        "cut_tokens": getattr(prepared.train_set, "cut", 0),
        "cut_texts": getattr(prepared.train_set, "cut_rows", 0),
        "best": {"figure": best[0], **(asdict(result.best) if result.best else {})},
        "first": asdict(result.first) if result.first else None,
        "last": asdict(result.last) if result.last else None,
        "stopped": result.stopped,
        "interrupted": result.interrupted,
        "steps": result.steps,
        "epochs": result.epochs,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "flops": result.flops,
        "peak_memory": result.peak_memory,
        "trained_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in prepared.model.parameters()),
        "seed": prepared.sections.train.seed,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }
