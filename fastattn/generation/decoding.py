"""Continue prompts token by token: greedy, sampled or by beams, with a KV cache, for batches padded on either side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.generation.beam import beam_search
from fastattn.generation.choosing import Chooser
from fastattn.generation.drivers import DecoderDriver, driver_of
from fastattn.generation.options import Options, Settled
from fastattn.generation.protocol import CausalLM, Decodes, GenerationError
from fastattn.generation.rows import Rows
from fastattn.generation.sampling import LogitsProcessor
from fastattn.generation.speculation import speculate
from fastattn.nn.modes import evaluating
from fastattn.ops.arguments import check_tensor

ID_DTYPES = (torch.int64, torch.int32)  # the dtypes that an embedding accepts as indices


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    min_new_tokens: int | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    num_return_sequences: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Decodes | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    prompt_lookup_num_tokens: int | None = None,
    prefill_chunk_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    batch_invariant: bool = False,
) -> Tensor:
    """Continue prompts token by token: greedily, by sampling or by beam search.

    Runs in eval mode and restores the mode. An argument that is None takes its value from the model's
    `generation_config` (a checkpoint's generation_config.json), else it has no effect.

    Args:
        model: a `CausalLM`, such as `fastattn.models.GPT`.
        input_ids: (B, S) int64 or int32, prompts, padded on either side where lengths differ; S is 1 or more.
        attention_mask: (B, S), nonzero = a real token, of which each row has one; None = all are.
        max_new_tokens: most tokens to add, 20 by default; fewer where every row has ended.
        do_sample: draw from the distribution, else take the most likely token.
        temperature, top_k, top_p, min_p: divide the logits; keep the k likeliest tokens; then the fewest of the
            likeliest that together reach probability p; then those at least min_p times as likely as the likeliest.
            They need do_sample. top_k=0, top_p=1.0 and min_p=0.0 keep every token, whatever the folder's file says.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or continuation.
        presence_penalty: is subtracted from the logits of tokens in the continuation.
        no_repeat_ngram_size: no run of so many tokens comes twice in prompt and continuation; 0 = none is excluded.
        min_new_tokens: end tokens are excluded before so many tokens, at most max_new_tokens; stop strings are not.
        num_beams: sequences that beam search keeps for each prompt; 1 = no beam search.
        length_penalty: a beam's score is its log-probability / (its new tokens ** length_penalty), 1.0 by default.
        early_stopping: True ends when num_beams sequences have ended; False (default) when no better one is likely;
            "never" when none can be better.
        num_return_sequences: continuations of each prompt, sampled ones or the best beams; rows of one prompt are
            neighbours.
        eos_token_id: token or tokens of the vocabulary that end a row; None = the config's, an empty sequence = none.
        pad_token_id: what follows the end of a finished row; None = the config's, else the first end token.
        stop_strings: texts of which the first to be complete in a continuation ends it. Tokens that hold a character of
            it are not returned. They need tokenizer, which turns ids into text. One that is a special token, as
            "<|im_end|>", ends a row like eos_token_id. An empty list = none.
        tokenizer: has decode(ids, skip_special_tokens=True): fastattn.data's, tokenizers' or transformers'.
        logits_processor: functions of (ids so far (R, n), scores (R, V) float32) that return scores; they run after the
            penalties and exclusions, as in transformers.
        prompt_lookup_num_tokens: most tokens that are guessed from an earlier occurrence of the last ones and checked
            in one step, 0 = none. Guessing stops where it does not pay, which is timed in the run. The result is the
            same as without it: bit by bit with batch_invariant, else unless two logits are closer than rounding. Not
            with num_beams, logits_processor or use_cache=False.
        prefill_chunk_size: most tokens of a prompt that are read at once; bounds memory. Not with use_cache=False.
        seed: makes sampling reproducible: row r draws from stream r of the seed, whatever else is in the batch. A list
            has a seed for each prompt, whose continuations draw as they do alone with that seed.
        generator: draws the seed; at most one of both.
        use_cache: keep keys and values; if False, every step recomputes the whole sequence. The result is the same,
            except under "dynamic" rotary scaling past the original length, where cached keys keep their angles.
        batch_invariant: logits, and so tokens, have the bits that their row has alone. Slower: prompts are read one by
            one, and a step's products made in blocks of a fixed number of rows. Not with use_cache=False.

    Returns:
        Prompt and continuation ids, (B * num_return_sequences, S + n) with n <= max_new_tokens, in the dtype of
        input_ids; rows that ended early are filled with pad_token_id.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: an argument is out of range, options do not go together, prompt and max_new_tokens exceed the
            model's learned positions, batch_invariant or prompt_lookup_num_tokens is asked of a model without a
            decoder, generation_config asks for what is not computed here, or the model's logits are not finite.
    """
    options = Options(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        logits_processor=logits_processor,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        prefill_chunk_size=prefill_chunk_size,
        seed=seed,
        generator=generator,
        use_cache=use_cache,
        batch_invariant=batch_invariant,
    )
    settled, mask = prepared(model, input_ids, attention_mask, options)
    copies = settled.num_return_sequences
    if settled.num_beams > 1:
        with evaluating(model):
            return beam_search(model, input_ids, mask, settled)
    rows = rows_of(model, input_ids, mask, settled)
    with evaluating(model):
        for _ in continuations(model, input_ids, mask, settled, rows):
            pass
    prompt = input_ids if copies == 1 else input_ids.repeat_interleave(copies, 0)
    return torch.cat((prompt, rows.tensor(input_ids)), dim=1)


def prepared(
    model: CausalLM, input_ids: Tensor, attention_mask: Tensor | None, options: Options
) -> tuple[Settled, Tensor | None]:
    """The options with every value decided, and the bool mask of real tokens, None where there is no padding."""
    check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype not in ID_DTYPES:
        got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        raise ValueError(
            f"input_ids: got {got}, needs int64 or int32 of shape (batch, length), a token at least"
        )
    batch, prompt_len = input_ids.shape
    mask = _mask_of(input_ids, attention_mask)
    if mask is not None:
        prompt_len = max(mask.sum(1).tolist())  # padding has no positions
    settled = options.settled(model, prompt_len, batch)
    longest = prompt_len + settled.max_new_tokens - 1  # the last token is never fed back
    if model.max_positions is not None and longest > model.max_positions:
        raise ValueError(
            f"max_new_tokens: a prompt of {prompt_len} and {settled.max_new_tokens} more tokens do not fit into "
            f"the model's {model.max_positions} learned positions"
        )
    return settled, mask


def rows_of(
    model: CausalLM, prompt: Tensor, mask: Tensor | None, options: Settled, with_text: bool = False
) -> Rows:
    """Empty continuations, one for each row that is to be generated."""
    return Rows(model, *_repeated(prompt, mask, options.num_return_sequences), options, with_text)


@torch.no_grad()
def continuations(
    model: CausalLM, prompt: Tensor, mask: Tensor | None, options: Settled, rows: Rows
) -> Iterator[None]:
    """Make the rows' tokens, a step at a time."""
    if rows.finished:
        return
    copies, lookup = options.num_return_sequences, options.prompt_lookup_num_tokens
    repeated = _repeated(prompt, mask, copies)
    chooser = Chooser(options, *repeated, model.config.vocab_size, rows.ends)
    driver = driver_of(
        model, prompt, mask, options.max_new_tokens + lookup, copies, use_cache=options.use_cache,
        batch_invariant=options.batch_invariant, chunk_size=options.prefill_chunk_size,
    )  # fmt: skip
    if lookup:
        if not isinstance(driver, DecoderDriver):
            raise GenerationError("prompt_lookup_num_tokens: this model has no decoder, which it needs")
        yield from speculate(driver, rows, chooser, *repeated, lookup)
        return
    logits = driver.first()
    for count in range(options.max_new_tokens):
        tokens = rows.append(chooser(logits, count))
        yield
        if rows.finished:
            return
        chooser.scores.add(tokens)
        logits = driver.next(tokens)


def _repeated(prompt: Tensor, mask: Tensor | None, copies: int) -> tuple[Tensor, Tensor | None]:
    """Prompts and mask with so many copies of each row."""
    if copies == 1:
        return prompt, mask
    return prompt.repeat_interleave(copies, 0), None if mask is None else mask.repeat_interleave(copies, 0)


def _mask_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The bool mask of real tokens; None where there is no padding."""
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, needs {tuple(input_ids.shape)}, input_ids' own"
        )
    real = attention_mask != 0
    if bool(real.all()):
        return None
    if not bool(real.any(-1).all()):
        raise ValueError("attention_mask: got a row without a real token, needs one at least in each")
    return real
