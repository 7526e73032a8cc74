"""Models of folders as a server holds them: a decoder with its engine, or an encoder with its worker."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from fastattn import console
from fastattn.console import InputError
from fastattn.data import DataError, Tokenizer
from fastattn.data.chat import ChatTemplate
from fastattn.data.vocabulary import check_vocabulary
from fastattn.generation.options import Options
from fastattn.generation.stopping import special_tokens
from fastattn.models import GPT, EncoderDecoder, families
from fastattn.nn.unpadding import tokens_at_a_time
from fastattn.serve.encoders import EncoderWorker
from fastattn.serve.engine import Engine, TargetEngine
from fastattn.serve.grammar import Grammars
from fastattn.serve.options import ServeOptions
from fastattn.serve.token_texts import TokenStrings
from fastattn.tasks import embed, fill, predict
from fastattn.tasks.batches import max_tokens
from fastattn.text_generation import vocabularies

Result = TypeVar("Result")


@dataclass(eq=False)
class Decoder:
    """What generates text, a GPT or an encoder-decoder, with its engine, its tokenizer and its chat template if any."""

    name: str
    engine: Engine | TargetEngine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    strings: TokenStrings
    grammars: Grammars
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def worker(self) -> Engine | TargetEngine:
        """What runs its requests."""
        return self.engine

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads the prompt, and the text does not follow it."""
        return isinstance(self.engine, TargetEngine)

    @property
    def card(self) -> dict[str, Any]:
        """Its entry in /v1/models."""
        return {
            **_card(self.name, self.created, "generate"),
            "max_model_len": self.engine.longest,
            "batch_invariant": self.engine.batch_invariant,  # whether tokens do not depend on what else runs
            "attention": not self.encodes,  # whether /attention draws its maps
        }


@dataclass(eq=False)
class Encoder:
    """An encoder with its worker; the task is that of its head."""

    name: str
    task: ModuleType
    model: Any
    worker: EncoderWorker
    core: Any  # a tokenizer for counting, as the worker's own is busy in its thread
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def longest(self) -> int:
        """Most tokens of a text that are read."""
        tokenizer = self.worker.tokenizer
        if self.task is embed:
            return embed.longest_read(self.model, tokenizer)
        return max_tokens(self.model, tokenizer)

    @property
    def card(self) -> dict[str, Any]:
        """Its entry in /v1/models."""
        mask = {"mask_token": self.worker.tokenizer.mask_token} if self.task is fill else {}
        return {
            **_card(self.name, self.created, self.task.NAME),
            "max_model_len": self.longest,
            "attention": True,
            **mask,
        }


def _card(name: str, created: int, task: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "fastattn", "task": task}


def load_all(folders: Sequence[Path], options: ServeOptions) -> dict[str, Decoder | Encoder]:
    """The models of folders by the folders' names, for `fastattn.serve.app.create_app`.

    Args:
        folders: of decoders, encoders or encoder-decoders, with their tokenizers.
        options: device, dtype and the sizes of the engines.

    Raises:
        InputError: a folder cannot be served, or two have one name.
    """
    names = [name_of(folder) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: names two folders, and a model is asked for by its folder's name")
    return in_own_thread(
        lambda: {name: load_one(name, folder, options) for name, folder in zip(names, folders)}
    )


def in_own_thread(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises in a thread that ends with it.

    OpenMP makes a pool of threads for each thread that runs torch's operations, and keeps it as long as that lives.
    Once pools have more threads than there are processors, as those of this thread and a model's, libgomp lets them
    sleep between two operations instead of spinning, and waking them takes as long as a small operation.
    """
    outcome: Future[Result] = Future()
    threads = torch.get_num_threads()  # a new thread has the number that torch began with

    def run() -> None:
        torch.set_num_threads(threads)
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # a daemon, so that a signal need not wait for it
    thread = threading.Thread(target=run, name="fastattn-loading", daemon=True)
    thread.start()
    result = outcome.result()
    thread.join()  # with its threads
    return result


def name_of(folder: Path) -> str:
    """The name that clients ask for a folder by."""
    console.check_folder(folder)
    return Path(os.path.abspath(folder)).name  # a link is named as it is, wherever it leads


def load_one(name: str, folder: Path, options: ServeOptions) -> Decoder | Encoder:
    """The model of a folder, loaded and ready; its thread is not started yet."""
    try:
        cls = families.class_for(folder)
        if issubclass(cls, (GPT, EncoderDecoder)):
            return _decoder(name, folder, options)
    except (DataError, ValueError) as error:
        raise InputError(str(error)) from None
    task = predict.task_of(folder)
    model, tokenizer = predict.load_folder(folder, task)
    model = _placed(model, options)
    batch_tokens = options.batch_tokens
    if batch_tokens is None:
        batch_tokens = tokens_at_a_time(next(model.parameters()).device)
    worker = EncoderWorker(task, model, tokenizer, batch_tokens, options.max_queue)
    core = type(tokenizer.core).from_str(tokenizer.core.to_str())
    return Encoder(name, task, model, worker, core)


def _decoder(name: str, folder: Path, options: ServeOptions) -> Decoder:
    tokenizer = Tokenizer.from_pretrained(folder)
    model = _placed(families.load(folder, dtype=options.dtype), options)
    check_vocabulary(f"{folder}: tokenizer", tokenizer.core, vocabularies(model))
    try:
        refuse_defaults(model, tokenizer)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}: {error}") from None
    engine = _engine(model, options)
    template = None if tokenizer.chat_template is None else ChatTemplate.of(tokenizer)
    strings = TokenStrings(tokenizer)
    return Decoder(name, engine, tokenizer, template, strings, Grammars(model, strings))


def refuse_defaults(model: Any, tokenizer: Tokenizer) -> None:
    """TypeError or ValueError for a generation_config that would make every request fail, whatever it asks for."""
    usual = Options(
        max_new_tokens=1, do_sample=True, num_beams=1, num_return_sequences=1, prompt_lookup_num_tokens=0,
        tokenizer=tokenizer,
    )  # fmt: skip
    settled = usual.settled(model, 1, 1)
    special_tokens(model, settled.eos_token_id, settled.pad_token_id)


def _engine(model: Any, options: ServeOptions) -> Engine | TargetEngine:
    if isinstance(model, EncoderDecoder):
        return TargetEngine(
            model,
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_length=options.max_length,
        )
    return Engine(
        model,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_length=options.max_length,
        page_size=options.page_size,
        kv_memory=options.kv_memory,
    )


def _placed(model: Any, options: ServeOptions) -> Any:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        return model.to(device=device, dtype=dtype)
    except RuntimeError as error:
        raise InputError(f"--device: got {device!r}, {str(error).splitlines()[0]}") from None
