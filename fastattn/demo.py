"""The demo: available backends, accuracy and cost of attention, a swap, and a small GPT trained with it."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn import backends, demo_grid
from fastattn.console import InputError, Output
from fastattn.data import (
    DataError,
    PackedDataset,
    TextFiles,
    Tokenizer,
    TokenStream,
    default_corpus,
    split,
    train_bpe,
)
from fastattn.models import GPT, GPTConfig
from fastattn.train import ConfigError, TrainConfig, Trainer, plot_loss
from fastattn.train.progress import NoDisplay, ProgressDisplay, default_display

DEFAULT_OUT = "fastattn-demo"
MAX_CHARACTERS = 8_000_000  # more than the demo's training run reads
MIN_TOKENS = 1024
HELD_OUT = 0.1
PROMPT = "The"  # without a space, which belongs to the next token
WHEN_IT_HELPS = {
    "cpu": "On a CPU fastattn saves time and memory where a mask hides many keys (windows, packed documents, padding) "
    "or torch has no fused call (softcap, sinks); short or dense calls without these are at parity or slower.",
    "cuda": "fastattn helps where torch needs a dense mask or writes the scores out (windows, documents, ALiBi, "
    "softcap, sinks); for plain dense and causal calls torch's own kernels are fast too: compare before a swap.",
}
LAYERS = 4  # of the encoder whose attention is swapped


@dataclass(frozen=True)
class Recipe:
    """Training options of the demo, chosen for the perplexity on two CPU cores.

    Training ends after `steps`, or earlier so that the whole demo takes about `seconds`: a slow machine gets a shorter
    run with the whole learning rate schedule, but at least `least_seconds` of training.
    """

    grid: tuple[demo_grid.Case, ...]
    vocab_size: int = 2048
    block_size: int = 128
    n_embd: int = 256
    n_layer: int = 2
    n_head: int = 4
    batch_size: int = 8
    steps: int = 500
    seconds: float = 150.0
    least_seconds: float = 30.0
    lr: float = 1.5e-3
    beta2: float = 0.99
    warmup_steps: int = 30
    evaluations: int = 5
    sample_tokens: int = 120


FULL = Recipe(grid=demo_grid.FULL)
QUICK = Recipe(grid=demo_grid.QUICK, n_embd=128, steps=120, seconds=60.0, sample_tokens=60)


def run(
    text: Path | None, out: Path | None, *, seed: int, steps: int | None, quick: bool, output: Output
) -> dict[str, Any]:
    """Run the demo and write its results to `out`; returns the summary that is also `out`/summary.json.

    The summary's "passed" says whether every check passed and training lowered the perplexity. Raises InputError for a
    text or directory that cannot be used, before anything is written. If anything else stops the demo, the directory
    that it created is removed.
    """
    recipe = QUICK if quick else FULL
    documents = _documents(text)
    started = time.monotonic()
    with _claimed(out) as folder:
        stream, tokenizer = _tokens(documents, text, recipe)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(seed)
        summary: dict[str, Any] = {
            "backends": _show_backends(output),
            "attention": _show_grid(recipe, device, dtype, seed, output),
            "swap": _show_swap(device, output),
        }
        left = (
            max(recipe.seconds - (time.monotonic() - started), recipe.least_seconds)
            if steps is None
            else None
        )
        summary["training"] = _train(
            recipe, stream, tokenizer, folder, seed, steps or recipe.steps, left, device, output
        )
        rows, training = summary["attention"], summary["training"]
        passed = all(row["passed"] for row in rows) and summary["swap"]["passed"] and training["passed"]
        summary.update(
            passed=passed, seed=seed, seconds=round(time.monotonic() - started, 1), out=str(folder)
        )
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    output.heading("Result")
    picture = "loss.png, " if (folder / "loss.png").exists() else ""
    output.line(
        f"{folder}: {picture}sample.txt, summary.json and model/ (weights, tokeniser, log, checkpoint)"
    )
    verdict = "every check passed" if passed else "a check failed: see the marked lines above"
    output.line(f"{verdict}, after {summary['seconds']:.0f} s", good=passed)
    return summary


def _documents(text: Path | None) -> Iterable[str]:
    if text is None:
        return default_corpus()
    try:
        return TextFiles(text)
    except DataError as error:
        raise InputError(f"--text: {error}") from None


@contextmanager
def _claimed(out: Path | None) -> Iterator[Path]:
    """The directory of results, created on entry and removed if the body raises."""
    folder = _first_free(DEFAULT_OUT) if out is None else out
    existed = folder.is_dir()
    try:
        if existed and any(folder.iterdir()):
            raise InputError(f"--out: {folder} is not empty, needs a new or empty directory")
        folder.mkdir(exist_ok=existed)
        (folder / "model").mkdir()
    except FileExistsError:
        raise InputError(f"--out: {folder} is a file, needs a new or empty directory") from None
    except FileNotFoundError:
        raise InputError(
            f"--out: {folder.parent} does not exist, needs an existing directory to write in"
        ) from None
    except OSError as error:
        raise InputError(f"--out: cannot write to {folder} ({error.strerror or error})") from None
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir()
        raise


def _first_free(name: str) -> Path:
    number = 1
    while (folder := Path(name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _tokens(documents: Iterable[str], text: Path | None, recipe: Recipe) -> tuple[TokenStream, Tokenizer]:
    """The text as token ids of a BPE that is trained on it."""
    kept, size = [], 0
    for document in documents:
        kept.append(document[: MAX_CHARACTERS - size])
        size += len(kept[-1])
        if size >= MAX_CHARACTERS:
            break
    tokenizer = train_bpe(kept, recipe.vocab_size)
    stream = TokenStream.build(kept, tokenizer)
    if len(stream) < MIN_TOKENS:
        raise InputError(
            f"--text: {text} holds {len(stream)} tokens, needs at least {MIN_TOKENS} to train on"
        )
    return stream, tokenizer


def _show_backends(output: Output) -> list[dict[str, Any]]:
    output.heading("Backends")
    found = [{"name": name, "available": why is None, "reason": why} for name, why in backends.available()]
    rows = [[str(b["name"]), "ok" if b["available"] else "no", str(b["reason"] or "")] for b in found]
    output.table(["backend", "here", "reason"], rows)
    return found


def _show_grid(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, seed: int, output: Output
) -> list[dict[str, Any]]:
    kind = f"forward and backward, {device.type}, {str(dtype).removeprefix('torch.')}"
    output.heading(f"Attention: {kind}")
    with output.waiting(f"measuring {len(recipe.grid)} cases ..."):
        measured = [demo_grid.measure(case, device, dtype, seed) for case in recipe.grid]
    output.line("Largest error against float64; allowed: twice torch's own and four roundings.")
    columns = ["case", "B x H x S x D", "backend", "error", "allowed", "check"]
    rows = [[m.name, m.shape, m.backend, f"{m.error:.1e}", f"{m.allowed:.1e}", m.verdict] for m in measured]
    output.table(columns, rows, verdict=len(columns) - 1)
    output.line()
    output.line("Compared with torch's scaled_dot_product_attention, with a dense mask where it needs one;")
    output.line("*: compared with the formula in plain torch, because torch's call does not support this.")
    output.table(
        ["case", "ms", "torch ms", "speed", "MiB", "torch MiB", "memory"], [_cost_row(m) for m in measured]
    )
    output.line(WHEN_IT_HELPS[device.type])
    return [asdict(m) | {"passed": m.passed} for m in measured]


def _cost_row(m: demo_grid.Measured) -> list[str]:
    star = "*" if m.peer == "formula" else ""
    ours, theirs = ("-" if size is None else f"{size / 2**20:.1f}" for size in (m.memory, m.peer_memory))
    ratio = f"{m.memory / m.peer_memory:.2f}x" if m.memory and m.peer_memory else "-"
    return [m.name, f"{m.ms:.1f}", f"{m.peer_ms:.1f}{star}", f"{m.peer_ms / m.ms:.2f}x", ours, theirs, ratio]


def _show_swap(device: torch.device, output: Output) -> dict[str, Any]:
    """Swap attention inside a torch encoder and compare outputs and gradients with its own, both against float64."""
    output.heading("Attention swapped inside a torch.nn.TransformerEncoder")
    layer = nn.TransformerEncoderLayer(256, 8, 512, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).to(device).eval()
    x = torch.randn(4, 128, 256, device=device)
    padding = torch.arange(128, device=device) >= torch.tensor([128, 100, 64, 31], device=device)[:, None]
    real = ~padding

    def results(model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's outputs at real tokens, and the gradient of its input there."""
        leaf = inputs.clone().requires_grad_()
        out = model(leaf, src_key_padding_mask=padding)[real]
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        return torch.cat([out.detach(), grad[real]]).double()

    golden = results(copy.deepcopy(encoder).double(), x.double())
    before = results(encoder, x)
    report = fastattn.swap_attention(encoder)
    after = results(encoder, x)
    fastattn.restore_attention(encoder)
    restored = torch.equal(results(encoder, x), before)
    eps = torch.finfo(torch.float32).eps
    error = (after - golden).abs().max().item()
    allowed = 2 * (before - golden).abs().max().item() + 4 * eps * golden.abs().max().item()
    passed = len(report.swapped) == LAYERS and error <= allowed and restored
    output.line(str(report))
    back = "restored exactly" if restored else "not restored"
    output.line(f"outputs and input gradient: error {error:.1e}, allowed {allowed:.1e}; {back}", good=passed)
    return {"error": error, "allowed": allowed, "restored": restored, "passed": passed} | report.to_dict()


def _train(
    recipe: Recipe,
    stream: TokenStream,
    tokenizer: Tokenizer,
    folder: Path,
    seed: int,
    max_steps: int,
    seconds: float | None,
    device: torch.device,
    output: Output,
) -> dict[str, Any]:
    """Train a GPT, plot its loss and generate text with it."""
    output.heading("A GPT trained on real text")
    train, held_out = split(stream, HELD_OUT, by="document" if len(stream.starts) > 10 else "position")
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        n_positions=recipe.block_size,
        n_embd=recipe.n_embd,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        positions="rotary",
        eos_token_id=tokenizer.eos_id,
    )
    model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    output.line(
        f"{parameters / 1e6:.1f} M parameters, {len(train):,} tokens to train on, {len(held_out):,} held out"
    )
    training = TrainConfig(
        output_dir=str(folder / "model"),
        max_steps=max_steps,
        max_seconds=seconds,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        beta2=recipe.beta2,
        warmup_steps=min(recipe.warmup_steps, max_steps),
        eval_every=max(max_steps // recipe.evaluations, 1),
        log_every=max(max_steps // 60, 1),
        keep_checkpoints=1,
        device=device.type,
        seed=seed,
    )
    data = PackedDataset(train, recipe.block_size), PackedDataset(held_out, recipe.block_size)
    try:
        trainer = Trainer(model, training, *data, tokenizer=tokenizer, display=_display(output))
    except ConfigError as error:  # for example a full disk
        raise InputError(f"--out: {error}") from None
    result = trainer.fit()
    if result.interrupted:
        raise KeyboardInterrupt
    first, last = result.first, result.last
    assert first is not None
    assert last is not None
    plot_loss(result.log, folder / "loss.png", title="fastattn demo", say=output.line)
    sample = _sample(model, tokenizer, recipe, seed)
    (folder / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    passed = math.isfinite(last.perplexity) and last.perplexity < first.perplexity
    speed = result.tokens / result.seconds
    output.line(
        f"validation perplexity {first.perplexity:.1f} before, {last.perplexity:.1f} after {result.steps} steps "
        f"({result.seconds:.0f} s, {speed:,.0f} tokens/s)",
        good=passed,
    )
    output.heading("A sample of its text")
    output.line(sample)
    return {
        "parameters": parameters,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(speed),
        "perplexity_before": first.perplexity,
        "perplexity_after": last.perplexity,
        "sample": sample,
        "passed": passed,
    }


def _display(output: Output) -> ProgressDisplay:
    return default_display() if output.shows_progress else NoDisplay()


def _sample(model: GPT, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> str:
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=device)
    ids = model.generate(
        prompt, max_new_tokens=recipe.sample_tokens, do_sample=True, temperature=0.8, top_p=0.95, seed=seed
    )
    return tokenizer.decode(ids[0].tolist()).strip()
