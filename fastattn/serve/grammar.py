"""`response_format`: text that keeps to a JSON schema or a regular expression, by xgrammar's masks of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as TooLate
from typing import Any

from torch import Tensor

from fastattn.generation.sampling import LogitsProcessor
from fastattn.generation.stopping import special_tokens
from fastattn.models import GPT
from fastattn.serve.engine.requests import FormatTooSlow
from fastattn.serve.errors import ApiError
from fastattn.serve.in_time import InTime
from fastattn.serve.json_schemas import check_regex, check_schema
from fastattn.serve.repetitions import nested_repetitions
from fastattn.serve.token_texts import TokenStrings

MOST_SPACES = 2  # in a row, where JSON allows any number
CACHE_BYTES = 64 << 20  # of compiled grammars
MASK_SECONDS = 1.0  # that the mask of one token may take, while all other requests of the model wait
MOST_REPETITIONS = 1000  # of a regular expression, in the product of counts that stand within each other
PARAM = "response_format"


class Grammars:
    """Compiles the formats of requests for one model's tokens; what was compiled is kept."""

    def __init__(self, model: GPT, strings: TokenStrings) -> None:
        self.model, self.strings = model, strings
        self._compiler: Any = None
        self._in_time = InTime(MASK_SECONDS)

    def constraint(self, asked: dict[str, Any] | None) -> Callable[[], LogitsProcessor] | None:
        """What makes the processor of a continuation in a format; None where any text will do.

        Raises:
            ApiError: the format is unknown or cannot be compiled, or xgrammar is missing.
        """
        kind = None if asked is None else asked.get("type")
        if asked is None or asked == {"type": "text"}:
            return None
        compiled = self._compiled(kind, asked)

        def make() -> LogitsProcessor:
            return GrammarMask(compiled, self._in_time)

        return make

    def _compiled(self, kind: Any, asked: dict[str, Any]) -> Any:
        if kind not in ("json_object", "json_schema", "regex"):
            known = "text, json_object, json_schema or regex"
            raise ApiError(400, f"response_format.type: needs {known}", param=PARAM)
        compiler = self._ready()
        try:
            if kind == "regex":
                if not isinstance(asked.get("regex"), str):
                    raise ApiError(400, "response_format.regex: needs a regular expression", param=PARAM)
                _kept("regex", check_regex, asked["regex"])
                refuse_nested("response_format.regex", asked["regex"])
                return compiler.compile_regex(asked["regex"])
            schema: Any = {"type": "object"}
            if kind == "json_schema":
                described = asked.get("json_schema")
                schema = described.get("schema") if isinstance(described, dict) else None
                if not isinstance(schema, dict):
                    raise ApiError(
                        400, "response_format.json_schema.schema: needs a JSON schema", param=PARAM
                    )
                _kept("json_schema.schema", check_schema, schema)
                for expression in patterns_of(schema):
                    refuse_nested("response_format.json_schema.schema", expression)
            return compiler.compile_json_schema(json.dumps(schema), max_whitespace_cnt=MOST_SPACES)
        except ApiError:
            raise
        except Exception as error:  # xgrammar's own, of a schema or an expression
            reason = " ".join(str(error).split())[-200:]
            raise ApiError(400, f"response_format: cannot be compiled: {reason}", param=PARAM) from None

    def _ready(self) -> Any:
        if self._compiler is not None:
            return self._compiler
        try:
            import xgrammar
        except ImportError:
            raise ApiError(
                400,
                "response_format: the server has no xgrammar: pip install 'fastattn[grammar]'",
                param=PARAM,
            ) from None
        ends, _ = special_tokens(self.model, None, None)
        if not ends:
            raise ApiError(400, "response_format: the model has no end token, which it needs", param=PARAM)
        core = self.strings.tokenizer.core
        special = {number for number, token in core.get_added_tokens_decoder().items() if token.special}
        size = self.model.config.vocab_size
        # of no text: special tokens, and ids beyond the tokenizer's
        vocabulary = [b"" if i in special else bytes(self.strings.bytes_of(i)) for i in range(size)]
        info = xgrammar.TokenizerInfo(vocabulary, vocab_size=size, stop_token_ids=list(ends))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)
        return self._compiler


def patterns_of(schema: Any) -> Iterator[str]:
    """The regular expressions of a JSON schema, and every other text that stands where one may."""
    if isinstance(schema, dict) and isinstance(pattern := schema.get("pattern"), str):
        yield pattern
    for inner in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(inner, (dict, list)):
            yield from patterns_of(inner)


def refuse_nested(name: str, expression: str) -> None:
    """ApiError for an expression whose matcher would follow too many ways to read the same text."""
    found = nested_repetitions(expression)
    if found > MOST_REPETITIONS:
        raise ApiError(
            400,
            f"{name}: counts of repetitions that stand within each other around what may be empty have the product "
            f"{found}, needs {MOST_REPETITIONS} at most",
            param=PARAM,
        )


def _kept(name: str, check: Callable[[Any], None], value: Any) -> None:
    """Refuses what xgrammar would leave out without a sign."""
    try:
        check(value)
    except ValueError as error:
        raise ApiError(400, f"response_format.{name}: {error}", param=PARAM) from None


class GrammarMask:
    """The `LogitsProcessor` of one continuation: -inf for every token that no text of the format goes on with."""

    def __init__(self, compiled: Any, in_time: InTime) -> None:
        import xgrammar

        self.apply = xgrammar.apply_token_bitmask_inplace
        self.begin = lambda: xgrammar.GrammarMatcher(compiled)
        self.matcher: Any = None  # which takes time as a mask does
        self.mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self.in_time = in_time
        self.seen: int | None = None  # tokens of prompt and continuation that the matcher knows

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids: (1, n); scores: (1, V). FormatTooSlow if the mask takes too long."""
        new = ids[0, ids.shape[1] if self.seen is None else self.seen :].tolist()
        self.seen = ids.shape[1]
        try:
            masked = self.in_time(lambda: self._follow(new))
        except TooLate:
            raise FormatTooSlow(
                f"response_format: the tokens that may follow were not found within {MASK_SECONDS:g} s"
            ) from None
        if not masked:
            return scores
        scores = scores.clone()
        self.apply(scores, self.mask.to(scores.device))
        return scores

    def _follow(self, tokens: list[int]) -> bool:
        """Take the tokens over and fill the mask; whether it leaves any out."""
        if self.matcher is None:
            self.matcher = self.begin()
        for token in tokens:
            if not self.matcher.accept_token(token):
                raise RuntimeError("a token was made that the format does not allow")
        return bool(self.matcher.fill_next_token_bitmask(self.mask))
