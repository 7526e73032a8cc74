"""Continuations as they grow: pieces of text, or ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor

from fastattn.generation.decoding import continuations, prepared, rows_of
from fastattn.generation.options import Options
from fastattn.generation.protocol import CausalLM, Decodes, Seq2SeqLM
from fastattn.generation.rows import Row
from fastattn.nn.modes import evaluating

SOURCE_OPTIONS = ("decoder_input_ids", "token_type_ids")  # of an encoder-decoder's `continuation`


def stream_text(
    model: CausalLM | Seq2SeqLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Decodes,
    **options: Any,
) -> Iterator[str]:
    """The text of a prompt's continuation in pieces, none of them empty; together they are the whole text.

    An encoder-decoder gives the text of a source's target.

    A piece never ends within a character and never holds a part of a stop string: text that may begin one is held back
    until that is decided. An incomplete character at the very end is left out.

    Args:
        model: a `CausalLM`, such as `fastattn.models.GPT`, or a `fastattn.models.EncoderDecoder`.
        input_ids: (1, S) int64 or int32, the prompt, or an encoder-decoder's source.
        attention_mask: (1, S), nonzero = a real token; None = all are.
        tokenizer: has decode(ids, skip_special_tokens=True).
        options: those of `generate`, but for beams and several sequences; for an encoder-decoder decoder_input_ids and
            token_type_ids too.

    Returns:
        An iterator of str; each step of it runs the model in eval mode and restores the mode.

    Raises:
        TypeError, ValueError: as `generate`; for arguments when this is called, before any work.
    """
    if tokenizer is None:
        raise TypeError("tokenizer: got NoneType, needs a tokenizer, which has decode(ids)")
    row, steps = _one_row(model, input_ids, attention_mask, {**options, "tokenizer": tokenizer})

    def pieces() -> Iterator[str]:
        for _ in steps:
            assert row.text is not None
            piece = row.text.take()
            if piece:
                yield piece

    return pieces()


def stream_ids(
    model: CausalLM | Seq2SeqLM, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Iterator[list[int]]:
    """The ids of a prompt's continuation in lists: one id a step, more where guesses were right.

    With stop strings an id is yielded once none of its characters can belong to one.

    Args:
        model, input_ids, attention_mask, options: those of `stream_text`; tokenizer is needed for stop strings only.

    Returns:
        An iterator of lists of int.

    Raises:
        TypeError, ValueError: as `stream_text`.
    """
    row, steps = _one_row(model, input_ids, attention_mask, options)

    def pieces() -> Iterator[list[int]]:
        taken = 0
        for _ in steps:
            if row.given > taken:
                yield row.ids[taken : row.given]
                taken = row.given

    return pieces()


def _one_row(
    model: CausalLM | Seq2SeqLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Row, Iterator[None]]:
    """The continuation of one prompt, and its steps: the model is in eval mode while one is made, and only then."""
    causal, input_ids, attention_mask, options = behind_source(model, input_ids, attention_mask, options)
    settled, mask = prepared(causal, input_ids, attention_mask, Options(**options))
    if len(input_ids) != 1:
        raise ValueError(f"input_ids: got {len(input_ids)} prompts, needs one to stream its continuation")
    for name in ("num_beams", "num_return_sequences"):
        if getattr(settled, name) > 1:
            raise ValueError(f"{name}: got {getattr(settled, name)}, needs 1 to stream a continuation")
    rows = rows_of(causal, input_ids, mask, settled, with_text=settled.tokenizer is not None)

    def steps() -> Iterator[None]:
        made = continuations(causal, input_ids, mask, settled, rows)
        while True:
            with evaluating(model):
                if next(made, made) is made:
                    return
            yield

    return rows.rows[0], steps()


def behind_source(
    model: CausalLM | Seq2SeqLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[CausalLM, Tensor, Tensor | None, dict[str, Any]]:
    """The causal model, its prompts, their mask and the options of generation; of an encoder-decoder its target's."""
    read = getattr(model, "continuation", None)
    if read is None:
        return cast(CausalLM, model), input_ids, attention_mask, options
    own = {name: value for name, value in options.items() if name in SOURCE_OPTIONS}
    causal, start = read(input_ids, attention_mask, **own)
    return causal, start, None, {name: value for name, value in options.items() if name not in own}
