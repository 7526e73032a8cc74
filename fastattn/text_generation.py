"""Continues text, or generates an encoder-decoder's targets, with a model's folder: the work of `fastattn generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn import console
from fastattn.console import InputError, is_unicode

if TYPE_CHECKING:
    from fastattn.data import Tokenizer


TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")  # files that a folder with a tokenizer has one of


def check_folder(folder: Path) -> None:
    """Raise InputError unless it is a folder with a config.json, or with an adapter."""
    console.check_folder(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{folder}: holds no config.json, needs a model's folder")


def check_tokenizer(folder: Path) -> None:
    """Refuse what is no folder for --target-tokenizer."""
    try:
        found = folder.is_dir()
    except OSError:  # a name too long
        found = False
    if not found:
        raise InputError(
            f"--target-tokenizer {str(folder)[:200]}: no such folder, needs one with a tokenizer"
        )


def load_folder(
    folder: Path, kind: str | None, target: Path | None = None
) -> tuple[Any, Tokenizer, Tokenizer]:
    """The model, on a GPU where there is one, the tokenizer of its input and that of its output.

    An adapter's folder may leave the tokenizer to the folder of its base model.

    kind: "int8" for 8-bit weights, on a CPU. target: the folder of the tokenizer of an encoder-decoder's targets, where
    that is not the one of its sources.
    """
    import torch

    from fastattn.data import DataError, Tokenizer
    from fastattn.data.vocabulary import check_vocabulary
    from fastattn.models import load

    own = any((folder / name).is_file() for name in ("config.json", *TOKENIZERS))
    try:
        found = Tokenizer.from_pretrained(folder) if own else None
        model: Any = load(folder)
        tokenizer = found or Tokenizer.from_pretrained(model.loaded_from)
        written = tokenizer if target is None else Tokenizer.from_pretrained(target)
        if not hasattr(model, "generate"):
            raise InputError(f"{folder}: holds a {type(model).__name__}, which does not generate text")
        if kind is not None:
            model = model.quantize(kind)
    except (DataError, ValueError) as error:
        raise InputError(str(error)) from None
    sizes = vocabularies(model)
    if target is not None and len(sizes) == 1:
        raise InputError(f"--target-tokenizer: {folder} holds no encoder-decoder, it writes what it reads")
    if target is None and len(set(sizes.values())) > 1:
        raise InputError(
            f"{folder}: its tokenizer cannot be used for both parts, the encoder has {sizes['encoder']} tokens and "
            f"the decoder {sizes['decoder']}; --target-tokenizer names the decoder's"
        )
    try:
        for part, size in sizes.items():
            of, where = (written, target or folder) if part == "decoder" else (tokenizer, folder)
            check_vocabulary(f"{where}: tokenizer", of.core, {part: size})
    except DataError as error:
        raise InputError(str(error)) from None
    if kind is None and torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer, written


def vocabularies(model: Any) -> dict[str, int]:
    """The vocabulary size of each part of a model: {"model": V}, or "encoder" and "decoder" of an encoder-decoder."""
    parts = ("encoder", "decoder") if hasattr(model, "continuation") else ()
    return {part: getattr(model.config, part).vocab_size for part in parts} or {
        "model": model.config.vocab_size
    }


def options_of(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[str] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """The arguments of `generate`; options of sampling switch it on, and a temperature of 0 is greedy decoding."""
    shaping = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    shaping = {name: value for name, value in shaping.items() if value is not None}
    options = {name: value for name, value in others.items() if value is not None}
    if temperature == 0.0:
        from fastattn.generation.options import SHAPING

        if idle := [name for name, value in shaping.items() if value not in (0.0, SHAPING[name])]:
            raise InputError(f"--temperature 0: is greedy decoding, which does not use {_flags(idle)}")
        options["do_sample"] = False
    elif shaping:
        options |= {"do_sample": True, **shaping}
    if stop:
        if not all(stop):
            raise InputError("--stop: got an empty text")
        options["stop_strings"] = list(stop)
    return options


def prompts_of(prompt: str | None, data: Path | None, standard_input: str | None) -> list[str]:
    """The prompts: one text, or the "prompt" of each line of a JSONL file."""
    if data is not None:
        prompts = list(_read_data(data))
        if prompt is not None:
            raise InputError("--prompt and --data: needs one of them")
        return prompts
    text = (standard_input or "").removesuffix("\n") if prompt is None else prompt
    if not text:
        raise InputError("--prompt: got no text, and none on standard input")
    if "\0" in text or not is_unicode(text):
        raise InputError("--prompt: has characters that are not valid Unicode")
    return [text]


def continuations(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: dict[str, Any],
    written: Tokenizer | None = None,
) -> Iterator[tuple[int, str]]:
    """Pieces of text with the number of their prompt, as they are generated; for an encoder-decoder, of the targets.

    written: the tokenizer of the text that is made; None for that of the prompts.

    Raises:
        InputError: the model does not support a prompt or an option, or logits are not finite. Other exceptions are
            bugs of this package and are not converted.
    """
    import torch

    from fastattn.generation import stream_text
    from fastattn.generation.decoding import prepared
    from fastattn.generation.options import Options
    from fastattn.generation.protocol import GenerationError
    from fastattn.generation.stopping import special_tokens
    from fastattn.generation.streaming import behind_source
    from fastattn.generation.text import Detokenizer

    written = tokenizer if written is None else written
    device = next(model.parameters()).device
    size = next(iter(vocabularies(model).values()))  # of the part that reads prompts
    # one continuation of each prompt is printed, whatever the folder's generation_config asks for
    arguments = {**options, "tokenizer": written, "num_return_sequences": 1}
    for number, prompt in enumerate(prompts):
        tokens = tokenizer.core.encode(prompt).ids
        if not tokens:
            raise InputError("--prompt: got a text without a token")
        if max(tokens) >= size:
            token = tokenizer.core.id_to_token(max(tokens))
            raise InputError(f"--prompt: holds {token!r}, a token that the model has no embedding for")
        ids = torch.tensor([tokens], dtype=torch.int64, device=device)
        try:  # arguments are checked here, before any work
            causal, start, _, _ = behind_source(model, ids, None, {})
            beams = prepared(causal, start, None, Options(**arguments))[0].num_beams > 1
            special_tokens(causal, None, None)
            pieces = iter(()) if beams else stream_text(model, ids, **arguments)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
        try:
            if beams:
                made = model.generate(ids, **arguments)[0, start.shape[1] :].tolist()
                # after the prompt, as some decoders take the space off a text's first token
                text = Detokenizer(written, start[0].tolist())
                pieces = iter(["".join(map(text.push, made))])
            for piece in pieces:
                yield number, piece
        except GenerationError as error:
            raise InputError(str(error)) from None


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _read_data(path: Path) -> Iterator[str]:
    from fastattn.data import DataError, json_lines

    try:
        for where, entry in json_lines.objects_of(path, json_lines.MAX_BYTES):
            text = entry.get("prompt")
            if not isinstance(text, str) or not text:
                raise InputError(f'--data {where} has no text under "prompt"')
            if not is_unicode(text):
                raise InputError(f'--data {where} has characters under "prompt" that are not valid Unicode')
            yield text
    except DataError as error:
        raise InputError(f"--data {error}") from None
