"""Text from a causal language model, decoded as it comes, and timed.

The first token takes a pass over the whole prompt, each later one a pass of its own: they are timed
apart. Works on any model of transformers that generates, attached or not.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..progressive.exact import ExactStats
from ..text.detokenize import CONTEXT_TOKENS, Detokenizer
from ..tiering import Runtime
from ..vocabulary import Precision, Tier, is_below
from .forwards import peak_rss

Model = Any
"""A model of transformers that has ``generate``."""
Tokenizer = Any
"""The tokenizer of such a model, as AutoTokenizer loads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a model has written, and how long that took.

    ``first_token_seconds``: from the call to the first token, the prompt's pass included; None
    where none came. ``decode_seconds``: from the first token to the last. ``bytes_per_token``: the
    weight bytes that each token after the first brought into fast memory; None without a runtime,
    or without such a token.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float | None
    decode_seconds: float
    bytes_per_token: int | None
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """The rate after the first token; None where fewer than two came."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return it as a document."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C while text was generated: what had come stands in ``generation``."""

    def __init__(self, generation: Generation) -> None:
        super().__init__("generation was interrupted")
        self.generation = generation


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, *, chat: bool = False, system: str | None = None
) -> Tensor:
    """Return the token ids of a prompt, int64, (1, tokens). ``chat``: as a user's message in the
    tokenizer's chat template, after the ``system`` message where there is one.

    Raises InputError for an empty prompt, and for a template that is missing or refuses.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: give some text")
    if not chat:
        if system is not None:
            raise InputError("a system message has no effect without chat: give both, or neither")
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if not ids.numel():
            raise InputError(f"the tokenizer makes no token of the prompt {prompt!r}: give another")
        return torch.as_tensor(ids)
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "the tokenizer has no chat template, so the model wasn't made for chats: give the "
            "prompt as plain text to continue, or add chat_template.jinja to the model's folder"
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise InputError(
            f"the tokenizer's chat template refuses these messages ({error}): leave the system "
            "message out, or correct the template"
        ) from error
    return torch.as_tensor(encoded["input_ids"])


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Tensor,
    *,
    runtime: Runtime | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt: text, or token ids (1, tokens) such as ``encode_prompt`` returns.

    The model's generation_config says what ends the text and what sampling is limited to, and may
    change which token is the most likely: repetition_penalty, no_repeat_ngram_size, suppressed and
    forced tokens act as it sets them. Beams are not searched. ``temperature`` 0 then takes the most
    likely token at each step, so that the same command gives the same text, even where the model's
    own setting is to sample; above 0 it samples, from ``seed``, without changing torch's
    generators. ``on_text`` is called with each piece of text as soon as its characters are
    complete. ``runtime`` (of ``attach``) has the bytes moved per token.

    Raises InputError for a setting out of range and a prompt longer than the model's context, and
    GenerationInterrupted for Ctrl-C: the runtime may be used again, or detached.
    """
    if not getattr(model, "can_generate", bool)():
        raise InputError(f"a {type(model).__name__} doesn't generate text: give a causal LM")
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    room = _check_ids(model, ids)
    check_sampling(max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    settings = _settings(model, tokenizer, temperature=temperature, top_p=top_p, top_k=top_k)
    settings.max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
    device = next(model.parameters()).device
    stream = _Stream(tokenizer, on_text or (lambda text: None), runtime)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            model.generate(
                input_ids=ids.to(device),
                attention_mask=torch.ones_like(ids).to(device),
                generation_config=settings,
                streamer=stream,
                tokenizer=tokenizer,  # for the configuration's stop_strings
            )
        except KeyboardInterrupt:
            stream.end()
            raise GenerationInterrupted(stream.result(ids, interrupted=True)) from None
    return stream.result(ids)


def generation_figures(runtime: Runtime, generation: Generation) -> dict[str, Any]:
    """Return what an attached model has written, how fast, in how much memory, and what precision
    may have cost.
    """
    stats, ledger = runtime.stats(), runtime.veto.ledger
    held = {name: place.precision for name, place in runtime.plan.placements.items()}
    lossy = [p for name, p in held.items() if is_below(p, ledger.curves[name].native)]
    veto = runtime.veto.to_json()
    return {
        **generation.to_json(),
        "peak_weight_bytes": stats.peak_resident_bytes,
        "budget_bytes": runtime.budget.get(Tier.HBM),
        "peak_rss_bytes": peak_rss(),
        "bytes_per_tier": stats.bytes_per_tier,
        "lossless": not lossy,
        "precisions": {str(p): lossy.count(p) for p in Precision if p in lossy},
        **{name: veto[name] for name in ("epsilon_nats", "predicted_nats", "bound_nats")},
        "experts": None if stats.experts is None else asdict(stats.experts),
        "drafting": asdict(stats.drafting) if isinstance(stats, ExactStats) else None,
    }


def check_sampling(
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    spell: Callable[[str], str] = str,
) -> None:
    """Raise InputError for a setting of ``generate`` that is out of range or has no effect;
    ``spell`` turns a setting's name into what errors call it.
    """
    if max_new_tokens < 1:
        name = spell("max_new_tokens")
        raise InputError(f"{name} {max_new_tokens} is too small: give 1 or more")
    warmth = spell("temperature")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"{warmth} {temperature} must be a number from 0 up: 0 is greedy")
    for name, value in (("top_p", top_p), ("top_k", top_k)):
        if value is not None and not temperature:
            raise InputError(f"{spell(name)} has no effect at {warmth} 0: give one above 0, too")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"{spell('top_p')} {top_p} must be above 0 and at most 1, such as 0.9")
    if top_k is not None and top_k < 1:
        raise InputError(f"{spell('top_k')} {top_k} must be at least 1: give such as 40")


class _Stream:
    """What transformers' generate hands tokens to: the time of each, and their text."""

    def __init__(
        self, tokenizer: Tokenizer, on_text: Callable[[str], None], runtime: Runtime | None
    ) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._runtime = runtime
        self._text: Detokenizer | None = None
        """None: the prompt has not come."""
        self._pieces: list[str] = []
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._first_moved = 0
        """Bytes that had been moved when the first token came."""

    def put(self, ids: Tensor) -> None:
        """Take the prompt's tokens, then one token at a time."""
        if self._text is None:
            prompt = ids.flatten()[-CONTEXT_TOKENS:].tolist()
            self._text = Detokenizer(self._tokenizer, prompt)
            return
        self._times.append(time.perf_counter())
        if len(self._times) == 1:
            self._first_moved = self._moved()
        self._show(self._text.put(ids.flatten().tolist()))

    def end(self) -> None:
        """Hand on what was not complete yet."""
        if self._text is not None:
            self._show(self._text.end())

    def result(self, prompt_ids: Tensor, *, interrupted: bool = False) -> Generation:
        """Return what came of a prompt."""
        later = len(self._times) - 1
        moved = None
        if self._runtime is not None and later > 0:
            moved = round((self._moved() - self._first_moved) / later)
        return Generation(
            text="".join(self._pieces),
            prompt_tokens=prompt_ids.shape[1],
            new_tokens=len(self._times),
            first_token_seconds=self._times[0] - self._start if self._times else None,
            decode_seconds=self._times[-1] - self._times[0] if self._times else 0.0,
            bytes_per_token=moved,
            interrupted=interrupted,
        )

    def _moved(self) -> int:
        return 0 if self._runtime is None else self._runtime.stats().bytes_moved

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._on_text(text)


def _check_ids(model: Model, ids: Tensor) -> int | None:
    """Return how many tokens have room after a prompt; None where the model sets no limit."""
    config = model.config.get_text_config()
    if ids.dim() != 2 or len(ids) != 1 or not ids.shape[1]:
        raise InputError(
            f"the prompt's token ids have the shape {tuple(ids.shape)}: give one, (1, tokens)"
        )
    low, high = int(ids.min()), int(ids.max())
    if not 0 <= low <= high < config.vocab_size:
        raise InputError(
            f"the prompt's tokens lie in {low}..{high}, the model's vocabulary in "
            f"0..{config.vocab_size - 1}: the tokenizer is another model's, give the model's own"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return None
    if ids.shape[1] >= context:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens and the model a context of {context}: give at "
            f"most {context - 1}, so that there is room for an answer"
        )
    return int(context - ids.shape[1])


def _settings(
    model: Model,
    tokenizer: Tokenizer,
    *,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
) -> Any:
    """Return the model's own generation_config with the sampling asked for, or none."""
    settings = copy.deepcopy(model.generation_config)
    settings.num_beams = settings.num_return_sequences = 1
    settings.max_length = None
    settings.do_sample = temperature > 0
    if not settings.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(settings, name, None)
    else:
        settings.temperature = temperature
        settings.top_p = settings.top_p if top_p is None else top_p
        settings.top_k = settings.top_k if top_k is None else top_k
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:  # nothing is padded; transformers would say that it chose one
        ends = settings.eos_token_id
        settings.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return settings
