"""Continue text with a model's folder: the work of `fastattn generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn import console
from fastattn.console import InputError, data_entries, is_unicode

if TYPE_CHECKING:
    from fastattn.data import Tokenizer


def check_folder(folder: Path) -> None:
    """Refuse what is no folder with a model and a tokenizer."""
    console.check_folder(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds no config.json, needs a model's folder")


def load_folder(folder: Path, kind: str | None) -> tuple[Any, Tokenizer]:
    """The model, on a GPU where there is one, and its tokenizer. kind: "int8" for 8-bit weights, on a CPU."""
    import torch

    from fastattn.data import DataError, Tokenizer
    from fastattn.models import load

    try:
        tokenizer = Tokenizer.from_pretrained(folder)
        model: Any = load(folder)
        if not hasattr(model, "generate"):
            raise InputError(f"{folder}: holds a {type(model).__name__}, which generates no text")
        if not hasattr(model, "max_positions"):  # no CausalLM: an encoder-decoder
            raise InputError(
                f"{folder}: holds an {type(model).__name__}, which continues no prompt; call its generate"
            )
        if kind is not None:
            model = model.quantize(kind)
        elif torch.cuda.is_available():
            model = model.to("cuda")
    except (DataError, ValueError) as error:
        raise InputError(str(error)) from None
    return model, tokenizer


def options_of(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[str] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """The arguments of `generate`: what shapes sampling asks for it, and a temperature of 0 is greedy."""
    shaping = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    shaping = {name: value for name, value in shaping.items() if value is not None}
    options = {name: value for name, value in others.items() if value is not None}
    if temperature == 0.0:
        if len(shaping) > 1:
            raise InputError(
                f"--temperature 0 takes the likeliest token, so {_flags(shaping, 'temperature')} has no use"
            )
        options["do_sample"] = False
    elif shaping:
        options |= {"do_sample": True, **shaping}
    if stop:
        if not all(stop):
            raise InputError("--stop: got an empty text")
        options["stop_strings"] = list(stop)
    return options


def prompts_of(prompt: str | None, data: Path | None, standard_input: str | None) -> list[str]:
    """The prompts: one text, or "prompt" of each line of a JSONL file."""
    if data is not None:
        prompts = list(_read_data(data))
        if prompt is not None:
            raise InputError("--prompt and --data: needs one of them")
        return prompts
    text = (standard_input or "").removesuffix("\n") if prompt is None else prompt
    if not text:
        raise InputError("--prompt: got no text, nor any on standard input")
    if "\0" in text or not is_unicode(text):
        raise InputError("--prompt: holds characters that are no text")
    return [text]


def continuations(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], options: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    """Pieces of text, each with the number of its prompt, as they are made."""
    import torch

    from fastattn.generation import stream_text
    from fastattn.generation.decoding import prepared
    from fastattn.generation.options import Options

    device = next(model.parameters()).device
    # one continuation of each prompt is printed, whatever the folder's generation_config asks for
    arguments = {**options, "tokenizer": tokenizer, "num_return_sequences": 1}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer.core.encode(prompt).ids], dtype=torch.int64, device=device)
        if not ids.numel():
            raise InputError("--prompt: the tokenizer makes no token of it")
        try:
            settled, _ = prepared(model, ids, None, Options(**arguments))
            if settled.num_beams > 1:
                made = model.generate(ids, **arguments)[0, ids.shape[1] :].tolist()
                yield number, tokenizer.decode(made)
                continue
            for piece in stream_text(model, ids, **arguments):
                yield number, piece
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None


def _flags(names: dict[str, Any], without: str) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if name != without)


def _read_data(path: Path) -> Iterator[str]:
    for where, entry in data_entries(path):
        text = entry.get("prompt")
        if not isinstance(text, str) or not text:
            raise InputError(f'{where} has no text under "prompt"')
        if not is_unicode(text):
            raise InputError(f'{where} has characters under "prompt" that are no text')
        yield text
