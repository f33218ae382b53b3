"""The bodies of requests: what is understood, and nothing else.

A field that is not here is refused, not ignored. Fields of OpenAI's API that would change an answer
in a way that isn't implemented are here with the values that change nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..progressive.bounds import Metric, QualityBound, RequestError

Zero = Annotated[float, Field(ge=0, le=0, description="Only 0 is supported.")]
Nothing = Annotated[list[Any], Field(max_length=0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
BIGGEST = 2**31 - 1
INERT = {
    "frequency_penalty": "leave it out, or give 0",
    "presence_penalty": "leave it out, or give 0",
    "logit_bias": "leave it out",
    "echo": "leave it out, or give false",
    "suffix": "leave it out",
    "best_of": "leave it out, and give n",
    "modalities": "text is all that there is",
    "service_tier": "leave it out",
    "store": "nothing is stored; leave it out",
}
"""Fields that may only have values that change nothing -> what to do."""


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a character (a lone surrogate) is no text") from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]
Stop = Text | Annotated[list[Text], Field(max_length=16)]


class Body(BaseModel):
    """What all parts of bodies keep: no unknown field, no number as text."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A part of a message; pictures and sound are not read."""

    type: Literal["text"]
    text: Text


Content = Text | list[TextPart]


class CalledFunction(Body):
    """A function as it was called, its arguments as JSON text."""

    name: Text
    arguments: Text


class CalledTool(Body):
    """A call in an earlier message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """A message of a chat. The fields that replies have with nothing in them may come back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing | None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of the role {self.role}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of the role tool, and no other, has a tool_call_id")
        return self

    def text(self) -> str:
        """Return the content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    """A function that may be called."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema; None: it takes none."""
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The schema that an answer has to keep."""

    name: Name
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Body):
    """What a stream has beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class BoundBody(Body):
    """A quality bound in full."""

    epsilon: Annotated[float, Field(ge=0)] | None = None
    metric: Literal["kl", "exact"] = "kl"
    delta: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def bound(self) -> QualityBound:
        """Return it; raises RequestError."""
        if self.metric == "kl" and self.epsilon is None:
            raise RequestError(
                "quality_bound of metric kl has no epsilon: give one, in nats per token",
                param="quality_bound",
            )
        return QualityBound(
            epsilon=self.epsilon or 0.0, metric=Metric(self.metric), delta=self.delta
        )


class GenerationBody(Body):
    """What both endpoints take."""

    model: str
    quality_bound: Annotated[float, Field(ge=0)] | BoundBody | None = None
    """Mean KL from the full model, in nats per token; null: full precision."""
    max_tokens: Annotated[int, Field(ge=1, le=BIGGEST)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Who asks: it changes nothing."""
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options have no effect without stream: give both, or neither")
        if any(not stop for stop in self.stops):
            raise ValueError("stop has an empty text: give one that can be found")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def bound(self, default: QualityBound | None) -> QualityBound | None:
        """Return the bound that it declares; raises RequestError."""
        given = self.quality_bound
        if given is None:
            return default
        return given.bound() if isinstance(given, BoundBody) else QualityBound(epsilon=given)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=BIGGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    """Who asks: it changes nothing."""
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs have no effect without logprobs: give both")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools has a name twice: each needs its own")
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools: give some")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name!r}, which no tool is")
        if self.must_call and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format and a tool that must be called exclude each other")
        return self

    @property
    def active_tools(self) -> list[Tool]:
        """Tools that the answer may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def must_call(self) -> list[Tool]:
        """Tools of which the answer has to call one; none: it need not."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return list(self.tools or ()) if self.tool_choice == "required" else []
