"""What a user asks of exact output: what can be done is passed on, all else refused by name."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..errors import InputError
from .cache import Masks

_OWN_WAY = ("custom_generate", "assistant_model", "negative_prompt_ids", "synced_gpus")
_PASSED_ON = {
    "inputs",
    "input_ids",
    "attention_mask",
    "tokenizer",
    "use_model_defaults",
    "trust_remote_code",
}
_LENGTHENED = ("dynamic", "longrope")
"""Rotary embeddings that look at the longest position of a pass."""


def check_can_draft(model: Any) -> None:
    """Raise InputError, naming the class, for a model whose text can't be drafted."""
    reason = why_unfit(model, {"position_ids", "past_key_values"})
    if reason is not None:
        raise InputError(
            f"a {type(model).__name__} has no exact output, {reason}: attach without exact"
        )
    Masks(model.config, 1, [0], torch.device("cpu"))


def check_strict(model: Any) -> None:
    """Raise InputError for a model of which a pass may say anything else than its ordinary forward:
    in 16 bits routers, too, round otherwise, and choose other experts.
    """
    routed = any(name.lower().endswith("experts") for name, _ in model.named_modules())
    if routed and model.dtype.itemsize < 4:
        raise InputError(
            f"exact='strict' can't tell where the experts of a {type(model).__name__} in "
            f"{str(model.dtype).removeprefix('torch.')} are chosen otherwise than by plain "
            "generate: load it in float32, or attach with exact=True"
        )


def why_unfit(model: Any, needed: set[str]) -> str | None:
    """Return why a model's tokens can't be computed at places that are given and taken back; None:
    they can. ``needed``: what its ``forward`` has to take.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "can_generate", bool)():
        return "it doesn't generate text"
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if getattr(model, "_is_stateful", False):
        return "its layers have a state that can't be taken back"
    if missing := sorted(needed - inspect.signature(model.forward).parameters.keys()):
        return f"it takes no {', no '.join(missing)}"
    if getattr(text, "alibi", False):
        return "its attention goes by distances that its masks must say (ALiBi)"
    if hasattr(text, "attention_types"):
        return "its attention layers make masks of their own"
    return None


def check_length(config: Any, max_length: int) -> None:
    """Raise InputError for a text that rotary embeddings would compute anew on its way."""
    limit, kind = fixed_positions(config)
    if limit is not None and max_length > limit:
        raise InputError(
            f"positions beyond {limit} change what this model's rotary embeddings ({kind}) say "
            f"of those before, and the text may have {max_length} tokens: give a lower "
            "max_length, or attach without exact"
        )


def fixed_positions(config: Any) -> tuple[int | None, str]:
    """Return up to which length of a pass rotary embeddings stay the same, and their kind; None:
    whatever its length.
    """
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, Mapping)]
    for each in nested or [rope]:
        kind = each.get("rope_type")
        limit = each.get("original_max_position_embeddings") if kind == "longrope" else None
        limit = limit or getattr(config, "original_max_position_embeddings", None)
        if kind in _LENGTHENED:
            return limit or config.max_position_embeddings, kind
    return None, ""


def num_positions(config: Any) -> int | None:
    """Return how many positions a model has embeddings or a table for; None: it computes any."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "rope_parameters", None):
        return None
    return getattr(config, "max_position_embeddings", None)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of ``generate`` that exact output has no use for."""
    from transformers import GenerationConfig

    known = GenerationConfig()  # type: ignore[no-untyped-call]
    more = given.get("kwargs", {})
    wrong = [name for name in _OWN_WAY if given.get(name) is not None]
    wrong += [
        name
        for name, value in more.items()
        if value is not None and name not in _PASSED_ON and not hasattr(known, name)
    ]
    if wrong:
        raise InputError(
            f"generate({wrong[0]}=...) has no exact output, which takes token ids, an "
            "attention_mask and settings of the text: leave it out, or attach without exact"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise InputError("exact output computes in the model's own dtype: leave autocast")


def check_settings(settings: Any, given: Mapping[str, Any], *, batch: int) -> None:
    """Raise InputError for ways to decode other than greedy and sampled, and for what has a state
    of its own beside the text.
    """
    mode = settings.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise InputError(
            f"exact output is greedy or sampled, and this is {mode.value}: attach without exact"
        )
    refused = ("output_attentions", "output_hidden_states", "watermarking_config")
    wrong = [name for name in refused if getattr(settings, name, None)]
    numbers = ["guidance_scale"]
    if batch > 1:
        numbers += ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size"]
    wrong += [name for name in numbers if getattr(settings, name, None) not in (None, 0, 1)]
    if batch > 1:
        for name in ("prefix_allowed_tokens_fn", "streamer"):
            wrong += [f"{name} of a batch"] if given.get(name) is not None else []
    if wrong:
        raise InputError(f"{wrong[0]} has no exact output: leave it out, or attach without exact")


def arguments_to_pass(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``generate``'s arguments by name, with what ends at strings as a criterion: of a
    tokenizer, which that needs, ``generate`` tells no decoding of another's making.
    """
    from transformers import StoppingCriteriaList
    from transformers.generation.stopping_criteria import StopStringCriteria

    passed = {name: value for name, value in given.items() if name not in ("self", "kwargs")}
    more = dict(given.get("kwargs", {}))
    strings = more.get("stop_strings")
    for settings in (given.get("generation_config"), model.generation_config):
        strings = strings or getattr(settings, "stop_strings", None)
    if strings:
        if more.get("tokenizer") is None:
            raise InputError("stop_strings need the tokenizer: generate(..., tokenizer=tokenizer)")
        criteria = StoppingCriteriaList(given.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(more["tokenizer"], strings))
        passed["stopping_criteria"] = criteria
        more["stop_strings"] = None  # whatever the settings say
    passed.pop("custom_generate", None)
    return {**passed, **more}


def for_drafts(processors: Any, of_user: Collection[Any] | None) -> Any:
    """Return the logits processors that a draft's logits go through: those of a user may have a
    state, and see each token of the text once.
    """
    own = {id(each) for each in of_user or ()}
    kept = type(processors)()
    kept.extend(each for each in processors if id(each) not in own)
    return kept
