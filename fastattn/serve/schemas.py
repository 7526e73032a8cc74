"""What requests may hold, in the names of OpenAI's and vLLM's APIs. An unknown name is an error, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

MOST_SCORES = 20  # log-probabilities of a token
MOST_STOPS = 16
Ids = list[StrictInt]
Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)] | None
Count = Annotated[StrictInt, Field(ge=0)]


class Body(BaseModel):
    """What every body may hold; `user` and the like are accepted and have no effect."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    model: StrictStr | None = None
    user: StrictStr | None = None
    priority: Any = None
    request_id: Any = None


class StreamOptions(BaseModel):
    """What a stream holds besides."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(Body):
    """How tokens are chosen."""

    n: Annotated[StrictInt, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: StrictInt | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[StrictStr, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: StrictInt | None = None
    stop: Stop = None
    ignore_eos: bool = False
    response_format: dict[str, Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # of OpenAI's API, without effect here
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class CompletionBody(Sampling):
    """Of /v1/completions."""

    prompt: StrictStr | Ids | list[StrictStr] | list[Ids]
    max_tokens: Count | None = None
    echo: bool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_SCORES)] | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: StrictStr
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None

    def plain(self) -> dict[str, str]:
        """The message as templates read it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        return {"role": self.role, "content": text, **({} if self.name is None else {"name": self.name})}


class ChatBody(Sampling):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_SCORES)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None


class EmbeddingBody(Body):
    """Of /v1/embeddings."""

    input: StrictStr | Ids | list[StrictStr] | list[Ids]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class RerankBody(Body):
    """Of /rerank."""

    query: StrictStr
    documents: Annotated[list[StrictStr], Field(min_length=1)]
    top_n: Count = 0


class ClassifyBody(Body):
    """Of /classify."""

    input: StrictStr | list[StrictStr]


class TokenizeBody(Body):
    """Of /tokenize: a prompt, or messages."""

    prompt: StrictStr | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class PredictBody(Body):
    """Of /predict: what lines of `fastattn predict --data` hold, and its options."""

    data: Annotated[list[dict[StrictStr, StrictStr]], Field(min_length=1)]
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    no_answer: bool | None = None


class AttentionBody(Body):
    """Of /attention."""

    text: StrictStr
    text_pair: StrictStr | None = None
