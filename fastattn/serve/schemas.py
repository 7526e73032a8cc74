"""What requests may hold, in the names of OpenAI's and vLLM's APIs. An unknown name is an error, not ignored.

Of a body no more than one error is collected from each list, dictionary and set of names: pydantic would otherwise keep
one for each of a million entries that are wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST_SCORES = 20  # log-probabilities of a token
MOST_STOPS = 16
MOST_BIAS = 100  # in size, of a logit
UNKNOWN_NAME = "unknown_name"  # the type of an error, whose context has the name
Item = TypeVar("Item")


def _null_is(default: Any) -> BeforeValidator:
    """null stands for the default, as in OpenAI's API."""
    return BeforeValidator(lambda value: default if value is None else value)


def _each(check: Any, needs: str) -> AfterValidator:
    """Refuses a dictionary at the first value that does not pass."""

    def every(values: dict[str, Any]) -> dict[str, Any]:
        if not all(check(value) for value in values.values()):
            raise PydanticCustomError("value", f"needs {needs}")
        return values

    return AfterValidator(every)


def _absent(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported", "is not supported, needs null or nothing in it")
    return value


def _biases(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST_BIAS


Listed = Annotated[list[Item], Field(fail_fast=True)]
Ids = Listed[StrictInt]
Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS, fail_fast=True)] | None
Count = Annotated[StrictInt, Field(ge=0)]
Flag = Annotated[bool, _null_is(False)]
Absent = Annotated[Any, AfterValidator(_absent)]  # a name of the API that holds nothing
Texts = Annotated[dict[str, Any], _each(lambda value: isinstance(value, str), "texts")]


class Named(BaseModel):
    """What holds no names but its own."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="after")
    def _known(self) -> Named:
        for name in self.model_extra or ():
            raise PydanticCustomError(UNKNOWN_NAME, "unknown name", {"name": name})
        return self


class Body(Named):
    """What every body may hold; `user` and the like are accepted and have no effect."""

    model: StrictStr | None = None
    user: StrictStr | None = None
    priority: Any = None
    request_id: Any = None


class StreamOptions(Named):
    """What a stream holds besides."""

    include_usage: Flag = False
    include_obfuscation: bool | None = None  # without effect: nothing is added to hide lengths


class Sampling(Body):
    """How tokens are chosen."""

    n: Annotated[StrictInt, Field(ge=1), _null_is(1)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: StrictInt | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Count | None = None
    min_tokens: Count | None = None
    logit_bias: (
        Annotated[dict[str, Any], _each(_biases, f"numbers from -{MOST_BIAS} to {MOST_BIAS}")] | None
    ) = None
    seed: StrictInt | None = None
    stop: Stop = None
    stop_token_ids: Listed[StrictInt] | None = None
    ignore_eos: Flag = False
    response_format: dict[str, Any] | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    # of OpenAI's API, without effect here
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class CompletionBody(Sampling):
    """Of /v1/completions."""

    prompt: StrictStr | Ids | Listed[StrictStr] | Listed[Ids]
    max_tokens: Count | None = None
    echo: Flag = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_SCORES)] | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None


class TextPart(Named):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


class Message(Named):
    """A message of a conversation. One that the server sent may come back as it is."""

    role: StrictStr
    content: StrictStr | Listed[TextPart] | None = None
    name: StrictStr | None = None
    refusal: Absent = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: Absent = None
    annotations: Any = None  # of a text's sources, which no template reads

    def plain(self) -> dict[str, str]:
        """The message as templates read it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {"role": self.role, "content": text, **({} if self.name is None else {"name": self.name})}


class ChatBody(Sampling):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_SCORES)] | None = None
    tools: Absent = None
    functions: Absent = None
    # of OpenAI's API, which holds what is done anyway: text, and no calls of tools
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Listed[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None


class EncoderBody(Body):
    """Of encoders: -1 truncates texts to what the model reads, another number to so many tokens."""

    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = None


class EmbeddingBody(EncoderBody):
    """Of /v1/embeddings."""

    input: StrictStr | Ids | Listed[StrictStr] | Listed[Ids]
    encoding_format: Annotated[Literal["float", "base64"], _null_is("float")] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class RerankBody(EncoderBody):
    """Of /rerank."""

    query: StrictStr
    documents: Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[Count, _null_is(0)] = 0


class ClassifyBody(EncoderBody):
    """Of /classify."""

    input: StrictStr | Listed[StrictStr]


class TokenizeBody(Body):
    """Of /tokenize: a prompt, or messages."""

    prompt: StrictStr | None = None
    messages: Listed[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Annotated[bool, _null_is(True)] = True
    return_token_strs: Flag = False


class PredictBody(Body):
    """Of /predict: what lines of `fastattn predict --data` hold, and its options."""

    data: Annotated[list[Texts], Field(min_length=1, fail_fast=True)]
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    no_answer: bool | None = None


class AttentionBody(Body):
    """Of /attention."""

    text: StrictStr
    text_pair: StrictStr | None = None
