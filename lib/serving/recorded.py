"""Requests in a file, a JSON object a line, as OpenAI's API takes them."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import InputError
from ..files import parse_json
from ..progressive.generation import GenerationRequest
from .bodies import ChatBody, CompletionBody
from .prompts import Prompts


def read_requests(
    path: Path, model: Any, tokenizer: Any, *, new_tokens: int
) -> list[GenerationRequest]:
    """Return a file's requests; those without max_tokens get at most ``new_tokens``.

    Raises InputError, naming the line, for a file that can't be read and for what is no request.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"requests {path} can't be read: {error}") from error
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    prompts = Prompts(tokenizer, vocab_size=vocab_size)
    stops = model.generation_config.eos_token_id
    stop_ids = frozenset([stops] if isinstance(stops, int) else stops or ())
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = {"model": "", **parse_json(line)}
            if "messages" in document:
                chat = ChatBody.model_validate(document)
                prompt, given = prompts.chat(chat), chat.max_completion_tokens or chat.max_tokens
            else:
                text = CompletionBody.model_validate(document)
                if len(text.prompts) != 1:
                    raise InputError("give one prompt a line")
                prompt, given = prompts.text(text.prompts[0]), text.max_tokens
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}, line {number}: {place}: {first['msg']}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        requests.append(
            GenerationRequest(prompt=prompt, max_new_tokens=given or new_tokens, stop_ids=stop_ids)
        )
    return requests
