"""The options of generation: checked, filled from a model's generation_config, and refused where they do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fastattn.constants import MAX_INT32
from fastattn.generation.protocol import CausalLM, Decodes
from fastattn.generation.sampling import LogitsProcessor
from fastattn.generation.stopping import stop_tokens
from fastattn.ops.arguments import is_integer, is_number

NEW_TOKENS = 20  # as in transformers
SHAPING: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # without effect
SCORING: dict[str, float] = {
    "length_penalty": 1.0,
    "early_stopping": False,
}  # without effect where there are no beams

# What generation_config.json may hold beside end and padding tokens, which are read where those are settled.
HONOURED = (
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "no_repeat_ngram_size", "min_new_tokens", "num_beams", "length_penalty", "early_stopping", "num_return_sequences",
    "stop_strings", "prompt_lookup_num_tokens",
)  # fmt: skip
WITH_PROMPT = (
    "max_length",
    "min_length",
)  # stand for max_new_tokens and min_new_tokens, and count the prompt too
NOT_COMPUTED: dict[str, tuple[Any, ...]] = {  # key -> its values without effect
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "penalty_alpha", "diversity_penalty"), (None, 0)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (None, 0)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale", "num_beam_groups"), (None, 1)),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "token_healing"), (None, False)),
    **dict.fromkeys(
        (
            "bad_words_ids", "force_words_ids", "constraints", "forced_bos_token_id", "forced_eos_token_id",
            "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "sequence_bias", "top_h",
            "watermarking_config", "dola_layers", "max_time",
        ),
        (None, []),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The options of `generate`, see there. None = the value in generation_config, else a value without effect."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    tokenizer: Decodes | None = None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    prompt_lookup_num_tokens: int | None = None
    prefill_chunk_size: int | None = None
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    use_cache: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or name in ("use_cache", "batch_invariant"):
                check(name, value)

    def settled(self, model: CausalLM, prompt_len: int, prompts: int) -> Settled:
        """Every option's value for a model and so many prompts of this length.

        Raises:
            ValueError: options that do not go together, or a generation_config that asks for what is not computed.
        """
        given = _with_defaults(self, getattr(model, "generation_config", None), prompt_len)
        given._refuse_conflicts(prompts)
        stops = given.stop_strings or ()
        strings = (stops,) if isinstance(stops, str) else tuple(stops)
        processors = given.logits_processor or ()
        return Settled(
            max_new_tokens=NEW_TOKENS if given.max_new_tokens is None else int(given.max_new_tokens),
            do_sample=bool(given.do_sample),
            temperature=1.0 if given.temperature is None else float(given.temperature),
            top_k=int(given.top_k) if given.top_k else None,
            top_p=None if given.top_p in (None, 1.0) else float(given.top_p),
            min_p=float(given.min_p) if given.min_p else None,
            repetition_penalty=1.0 if given.repetition_penalty is None else float(given.repetition_penalty),
            presence_penalty=0.0 if given.presence_penalty is None else float(given.presence_penalty),
            no_repeat_ngram_size=int(given.no_repeat_ngram_size or 0),
            min_new_tokens=int(given.min_new_tokens or 0),
            num_beams=int(given.num_beams or 1),
            length_penalty=1.0 if given.length_penalty is None else float(given.length_penalty),
            early_stopping=given.early_stopping or False,
            num_return_sequences=int(given.num_return_sequences or 1),
            eos_token_id=given.eos_token_id,
            pad_token_id=given.pad_token_id,
            stop_strings=strings,
            stop_ids=() if given.tokenizer is None else stop_tokens(given.tokenizer, strings),
            tokenizer=given.tokenizer,
            logits_processor=(processors,) if callable(processors) else tuple(processors),
            prompt_lookup_num_tokens=int(given.prompt_lookup_num_tokens or 0),
            prefill_chunk_size=None if given.prefill_chunk_size is None else int(given.prefill_chunk_size),
            seed=given.seed,
            generator=given.generator,
            use_cache=given.use_cache,
            batch_invariant=given.batch_invariant,
        )

    def _refuse_conflicts(self, prompts: int) -> None:
        def refuse(names: str, reason: str) -> None:
            raise ValueError(f"{names}: {reason}")

        beams, sequences = self.num_beams or 1, self.num_return_sequences or 1
        shaping = [n for n, neutral in SHAPING.items() if getattr(self, n) not in (None, neutral)]
        if shaping and not self.do_sample:
            refuse(", ".join(shaping), "shapes sampling, needs do_sample=True")
        if self.batch_invariant and not self.use_cache:
            refuse("batch_invariant", "got True with use_cache=False, needs a cache")
        if self.seed is not None and self.generator is not None:
            refuse("seed", "give a seed or a generator, not both")
        if isinstance(self.seed, Sequence) and len(self.seed) != prompts:
            refuse("seed", f"got {len(self.seed)} seeds, needs one, or one for each of {prompts} prompts")
        if self.stop_strings and self.tokenizer is None:
            refuse("stop_strings", "needs tokenizer=, which turns ids into the text they are looked for in")
        if beams > 1:
            for name in ("do_sample", "stop_strings", "prompt_lookup_num_tokens"):
                if getattr(self, name):
                    refuse(f"{name}, num_beams", f"do not go together, got num_beams={beams}")
            if sequences > beams:
                refuse("num_return_sequences", f"got {sequences}, needs num_beams={beams} at most")
        else:
            for name, neutral in SCORING.items():
                if getattr(self, name) not in (None, neutral):
                    refuse(name, "scores beams, needs num_beams of 2 or more")
            if sequences > 1 and not self.do_sample:
                refuse("num_return_sequences", f"got {sequences}, needs do_sample=True or num_beams")
        if self.prompt_lookup_num_tokens and not self.use_cache:
            refuse("prompt_lookup_num_tokens", "got use_cache=False, needs a cache")
        if self.prompt_lookup_num_tokens and self.logits_processor is not None:
            refuse("prompt_lookup_num_tokens, logits_processor", "do not go together")
        if self.prefill_chunk_size is not None and not self.use_cache:
            refuse("prefill_chunk_size", "got use_cache=False, needs a cache")


@dataclass(frozen=True)
class Settled:
    """`Options` with every value decided."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    num_return_sequences: int
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: tuple[str, ...]
    stop_ids: tuple[int, ...]  # of those that are special tokens
    tokenizer: Decodes | None
    logits_processor: tuple[LogitsProcessor, ...]
    prompt_lookup_num_tokens: int
    prefill_chunk_size: int | None
    seed: int | Sequence[int] | None
    generator: torch.Generator | None
    use_cache: bool
    batch_invariant: bool


def _with_defaults(options: Options, config: Mapping[str, Any] | None, prompt_len: int) -> Options:
    """The options, those that are None filled from a generation_config; what that asks for must be computed here."""
    if not config:
        return options
    for key, harmless in NOT_COMPUTED.items():
        if key in config and config[key] not in harmless:
            raise ValueError(
                f"generation_config: {key}={config[key]!r} is not computed here; take it out of "
                f"model.generation_config to generate without it"
            )
    named = {name: config[name] for name in HONOURED if config.get(name) is not None}
    named = {**_from_lengths(options, config, prompt_len), **named}
    sampling = options.do_sample if options.do_sample is not None else named.get("do_sample", False)
    beams = options.num_beams if options.num_beams is not None else named.get("num_beams", 1)
    for names, used in (
        (SHAPING, sampling),
        (SCORING, is_integer(beams) and beams > 1),
    ):
        if not used:  # as in transformers, they have no effect until it is on
            named = {name: value for name, value in named.items() if name not in names}
    try:
        Options(**named)
    except (TypeError, ValueError) as error:
        raise type(error)(f"generation_config: {error}") from None
    missing = [field.name for field in fields(options) if getattr(options, field.name) is None]
    return replace(options, **{name: named[name] for name in missing if name in named})


def _from_lengths(options: Options, config: Mapping[str, Any], prompt_len: int) -> dict[str, int]:
    """max_new_tokens and min_new_tokens by a generation_config's lengths, which count the prompt too."""
    longest: Any
    least: Any
    longest, least = (config.get(name) for name in WITH_PROMPT)
    made = {}
    if is_integer(longest) and options.max_new_tokens is None and config.get("max_new_tokens") is None:
        if longest <= prompt_len:
            raise ValueError(
                f"generation_config: max_length: got {longest}, needs more than the {prompt_len} tokens of the prompt; "
                f"max_new_tokens comes before it"
            )
        made["max_new_tokens"] = int(longest) - prompt_len
    if is_integer(least):
        made["min_new_tokens"] = max(int(least) - prompt_len, 0)
    return made


Check = Callable[[str, Any], None]


def _whole(least: int, most: int = MAX_INT32) -> Check:
    def check(name: str, value: Any) -> None:
        if not is_integer(value):
            raise TypeError(f"{name}: got {value!r}, needs an integer")
        if not least <= value <= most:
            raise ValueError(f"{name}: got {value}, needs {least} or more, at most {most}")

    return check


def _real(needs: str, within: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not is_number(value):
            raise TypeError(f"{name}: got {value!r}, needs a number")
        if not (math.isfinite(value) and within(float(value))):
            raise ValueError(f"{name}: got {value}, needs {needs}")

    return check


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, needs True or False")


def _stopping(name: str, value: Any) -> None:
    if not isinstance(value, bool) and value != "never":
        raise ValueError(f'{name}: got {value!r}, needs True, False or "never"')


def _strings(name: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple, set, frozenset)) or not all(isinstance(t, str) for t in texts):
        raise TypeError(f"{name}: got {value!r}, needs a string or a list of strings")
    if not all(texts):
        raise ValueError(f"{name}: got {value!r}, needs strings that are not empty")


def _tokenizer(name: str, value: Any) -> None:
    if isinstance(value, bytes) or not callable(getattr(value, "decode", None)):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a tokenizer, which has decode(ids)")


def _processors(name: str, value: Any) -> None:
    each = [value] if callable(value) else value
    if not isinstance(each, (list, tuple)) or not all(map(callable, each)):
        raise TypeError(f"{name}: got {value!r}, needs a function of (input_ids, scores), or a list of them")


def _generator(name: str, value: Any) -> None:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch.Generator")


def _seed(name: str, value: Any) -> None:
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if not is_integer(each):
            raise TypeError(f"{name}: got {value!r}, needs an integer, or a list of one for each prompt")
        if not -(2**63) <= each < 2**64:
            raise ValueError(f"{name}: got {each}, needs a 64-bit integer")


_CHECKS: dict[str, Check] = {
    "max_new_tokens": _whole(0),
    "do_sample": _flag,
    "temperature": _real("a positive finite number; do_sample=False is greedy", lambda x: x > 0),
    "top_k": _whole(0),
    "top_p": _real("0 < top_p <= 1", lambda x: 0 < x <= 1),
    "min_p": _real("0 <= min_p <= 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": _real("a positive finite number", lambda x: x > 0),
    "presence_penalty": _real("a finite number", lambda x: True),
    "no_repeat_ngram_size": _whole(0),
    "min_new_tokens": _whole(0),
    "num_beams": _whole(1),
    "length_penalty": _real("-16 to 16, an exponent of a length", lambda x: -16 <= x <= 16),
    "early_stopping": _stopping,
    "num_return_sequences": _whole(1),
    "stop_strings": _strings,
    "tokenizer": _tokenizer,
    "logits_processor": _processors,
    "prompt_lookup_num_tokens": _whole(0),
    "prefill_chunk_size": _whole(1),
    "seed": _seed,
    "generator": _generator,
    "use_cache": _flag,
    "batch_invariant": _flag,
}
