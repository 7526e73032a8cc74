"""`fastattn generate`: continues text, or generates the target of a source, with the model of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, print_json, standard_input
from fastattn.collector import paused
from fastattn.constants import MAX_INT32

MAX_SEED = 2**63 - 1


def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model's folder with its tokenizer.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to continue, or a source; by default standard input."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='JSONL file with a text under "prompt" in each line, instead of --prompt.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, max=MAX_INT32, help="Most tokens to add.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="Divides the logits; 0 is greedy. This and the next three switch sampling on.",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, max=MAX_INT32, help="Keep the k likeliest tokens; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=1e-9, max=1, help="Keep the likeliest tokens that reach this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Keep tokens at least this many times as likely as the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1e3, help="Above 1, tokens that occurred before are less likely."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(min=-1e3, max=1e3, help="Subtracted from the logits of tokens of the continuation."),
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_INT32, help="No run of so many tokens comes twice; 0: any may."),
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(min=0, max=MAX_INT32, help="No end before so many tokens are added.")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, max=1024, help="Beams of beam search.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(min=0, max=1024, help="Most tokens guessed from earlier text in a step; 0: none."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of sampling.")] = None,
    target_tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the tokenizer of an encoder-decoder's targets, where it is another."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Use 8-bit weights, on a CPU.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Continue text with the model of a folder; the text is printed as it is generated.

    An encoder-decoder reads the text as its source and prints the target.

    Options that are not given default to the folder's generation_config.json, except --max-new-tokens.
    Exits with 2 on bad input.
    """
    with paused():
        from fastattn import text_generation as work

    options = work.options_of(
        temperature, top_k, top_p, min_p, stop, max_new_tokens=max_new_tokens, num_beams=num_beams, seed=seed,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        prompt_lookup_num_tokens=prompt_lookup, no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
    )  # fmt: skip
    work.check_folder(folder)
    standard = standard_input() if prompt is None and data is None else None
    prompts = work.prompts_of(prompt, data, standard)
    if target_tokenizer is not None:
        work.check_tokenizer(target_tokenizer)
    model, tokenizer, written = work.load_folder(folder, "int8" if int8 else None, target_tokenizer)
    texts = [""] * len(prompts)
    current = 0
    for number, piece in work.continuations(model, tokenizer, prompts, options, written):
        texts[number] += piece
        if not as_json:
            typer.echo("\n" * (number - current) + piece, nl=False)
            current = number
    if as_json:
        print_json({"continuations": [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]})
    else:
        typer.echo()
