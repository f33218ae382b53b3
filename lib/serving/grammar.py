"""Output that keeps a grammar: masks of the tokens that may come next, by llguidance."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..extras import need_extra
from ..progressive.bounds import RequestError
from ..progressive.generation import Constraint

Schema = Mapping[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
_NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""No spaces between tokens of JSON, of which small models would write lines."""
_INTERSECTING = ("allOf", "if", "then", "else", "dependentSchemas", "unevaluatedProperties")
"""Where these are, an object may get properties from several schemas."""


class Grammars:
    """Constraints in the tokens of one model. May be used by several threads."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._made: Any = None

    def json(self, schema: Schema, *, param: str) -> Constraint:
        """Return the constraint of JSON that keeps a schema; raises RequestError, which names the
        field of the request, for a schema that can't be kept.
        """
        return self._constraint(f"start: %json {_written(schema)}", param)

    def call(self, functions: Mapping[str, Schema | None]) -> Constraint:
        """Return the constraint of ``{"name": ..., "arguments": ...}``, a call of one of several
        functions, name -> schema of its arguments; raises RequestError like ``json``.
        """
        calls = [f"call{number}" for number in range(len(functions))]
        lines = [f"start: {' | '.join(calls)}"]
        for call, (name, schema) in zip(calls, functions.items(), strict=True):
            opening = json.dumps(f'{{"name":"{name}","arguments":')
            lines += [f'{call}: {opening} {call}_arguments "}}"']
            lines += [f"{call}_arguments: %json {_written(schema or _NO_ARGUMENTS)}"]
        return self._constraint("\n".join(lines), "tools")

    def _constraint(self, grammar: str, param: str) -> Constraint:
        need_extra("serve", "llguidance")
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens(), LLMatcher.grammar_from_lark(grammar), log_level=0)
        if error := matcher.get_error():
            reason = " ".join(error.split())
            raise RequestError(
                f"{param} has a JSON schema that output can't be held to ({reason}): simplify it",
                param=param,
                code="unsupported_schema",
            )
        return _Masks(matcher, self._vocab_size)

    def _tokens(self) -> Any:
        """Return llguidance's view of the tokenizer; it takes a second, the first time."""
        with self._lock:
            if self._made is None:
                from llguidance.hf import from_tokenizer

                size = max(self._vocab_size, len(self._tokenizer))
                stops = self._stop_ids or None
                self._made = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=stops)
            return self._made


class _Masks:
    """The constraint of one answer: a matcher that follows its tokens, and goes back with them."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._tokens: list[int] = []
        """What the matcher has read."""

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the mask (V,) of what may follow the answer's tokens; raises ValueError where they
        don't keep the grammar.
        """
        same = 0
        for ours, theirs in zip(self._tokens, tokens, strict=False):
            if ours != theirs:
                break
            same += 1
        if same < len(self._tokens):
            self._matcher.rollback(len(self._tokens) - same)
        if not self._matcher.consume_tokens(list(tokens[same:])):
            raise ValueError(f"the answer left its grammar: {self._matcher.get_error()}")
        self._tokens = list(tokens)
        allowed = bytearray(self._matcher.compute_logit_bias())
        return torch.frombuffer(allowed, dtype=torch.uint8)[: self._vocab_size] != 0


def _written(schema: Schema) -> str:
    """Return a schema as llguidance reads it."""
    intersects = any(f'"{word}"' in json.dumps(schema) for word in _INTERSECTING)
    closed = schema if intersects else _close(schema)
    return json.dumps({**closed, **_COMPACT})


def _close(schema: Any) -> Any:
    """Return a schema whose objects have no properties but those that it names, where it doesn't
    say that they may: what keeps it keeps the given one, and small models come to an end.
    """
    if isinstance(schema, list):
        return [_close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _close(each) for name, each in value.items()}
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict)
        else _close(value)
        if key in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties")
        else value
        for key, value in schema.items()
    }
    names = schema.get("properties")
    if isinstance(names, dict) and {*schema.get("required", ())} <= names.keys():
        if not schema.keys() & {"additionalProperties", "patternProperties", "anyOf", "oneOf"}:
            closed["additionalProperties"] = False
    return closed
